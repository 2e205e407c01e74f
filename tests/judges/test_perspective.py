"""The Perspective client against a local service that fails in every way a real one does."""

import datetime
import email.utils
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from icet_jax.errors import UserError
from icet_jax.judges import perspective
from icet_jax.judges.base import Scorer
from icet_jax.judges.cache import ScoreCache, cached
from icet_jax.judges.perspective import Perspective

SECRET = "placeholder-key-1234"
EARLY = datetime.date(2026, 11, 1)


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds
        self.waits.append(seconds)


def send(status, content="", **headers):
    """What the service does with a request: a status and a body."""

    def act(handler, body):
        data = content.encode() if isinstance(content, str) else content
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return act


def score(handler, body):
    """A text scores its length / 100, a second attribute 0.1 more, and so on."""
    value = len(body["comment"]["text"]) / 100
    found = {
        name: {"summaryScore": {"value": value + place / 10, "type": "PROBABILITY"}}
        for place, name in enumerate(body["requestedAttributes"])
    }
    send(200, json.dumps({"attributeScores": found, "languages": ["en"]}))(handler, body)


def hang_up(handler, body):
    handler.connection.shutdown(socket.SHUT_RDWR)


def summary(value):
    return json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}}}})


class Service:
    """`plan` holds what the next requests meet; after it they are scored. `requests`: (path, headers, body)."""

    def __init__(self):
        self.plan, self.requests = [], []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append((self.path, self.headers, body))
                (service.plan.pop(0) if service.plan else score)(self, body)

            def do_GET(self):
                service.requests.append((self.path, self.headers, None))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1alpha1/comments:analyze"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()


@pytest.fixture
def service():
    running = Service()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(perspective.KEY, SECRET)
    monkeypatch.setenv("no_proxy", "*")


def client(service, clock=None, **settings):
    clock = clock or Clock()
    return Perspective(endpoint=service.url, today=lambda: EARLY, clock=clock, sleep=clock.sleep, **settings)


def values(result, name="perspective"):
    return pytest.approx(result[name].values.tolist(), nan_ok=True)


def test_what_is_sent_and_what_comes_back(service):
    scorer = client(service, attributes=("toxicity", "SEVERE_TOXICITY"))
    result = scorer(["placeholder prompt", "p"], ["four", "naïve \u2028 odd!"])
    assert list(result) == ["perspective", "perspective.severe_toxicity"] and isinstance(scorer, Scorer)
    assert values(result) == [0.04, 0.12] and values(result, "perspective.severe_toxicity") == [0.14, 0.22]
    assert result["perspective"].labels == [None, None] and scorer.metric == "ts"
    path, headers, body = service.requests[0]
    assert body == {
        "comment": {"text": "four"},
        "languages": ["en"],
        "requestedAttributes": {"TOXICITY": {}, "SEVERE_TOXICITY": {}},
        "doNotStore": True,
    }
    assert headers["X-Goog-Api-Key"] == SECRET and SECRET not in path
    assert scorer.requests == 2 and scorer.last_failure is None
    assert scorer([], [])["perspective"].values.shape == (0,)


def test_the_name_says_the_attribute(service):
    assert client(service, attributes=("INSULT",)).name == "perspective.insult"
    marks = {client(service, attributes=a).fingerprint for a in [("INSULT",), ("TOXICITY",), ("TOXICITY", "INSULT")]}
    assert len(marks) == 3
    assert client(service, retries=1).fingerprint == client(service, requests_per_second=9).fingerprint


def test_equal_and_empty_responses(service):
    result = client(service)(["a", "b", "c", "d"], ["same", "same", "", " \n"])
    assert [0.04, 0.04, math.nan, math.nan] == values(result) and len(service.requests) == 1


@pytest.mark.parametrize(
    "failure",
    [
        send(429, "{}"),
        send(500),
        send(502, "<html>"),
        send(503, Retry_After="0"),
        send(503, Retry_After="soon"),
        send(504),
        send(408),
        send(200, "not json"),
        send(200, "[]"),
        send(200, "{}"),
        send(200, '{"attributeScores": {}}'),
        send(200, summary("0.5")),
        send(200, summary(1.5)),
        send(200, summary(True)),
        send(200, summary(None)),
        send(200, '{"attributeScores": {"TOXICITY": {"summaryScore": {"value": NaN}}}}'),
        send(200, b"\xff\xfe"),
        send(200, '{"attributeScores"', Content_Length="4000"),
        send(200, "", Content_Length="x"),
        send(204),
        hang_up,
    ],
)
def test_a_passing_failure_is_asked_again(service, failure):
    clock = Clock()
    service.plan = [failure, failure]
    scorer = client(service, clock, requests_per_second=1000)
    assert values(scorer(["p"], ["four"])) == [0.04]
    assert len(service.requests) == 3
    assert sum(1 for wait in clock.waits if wait >= 0.5) == 2


@pytest.mark.parametrize(
    "failure",
    [
        send(400, '{"error": {"message": "COMMENT_TOO_LONG"}}'),
        send(404),
        send(413),
        send(301, Location="/x"),
        send(307),
    ],
)
def test_what_will_not_pass_is_one_error_and_no_retry(service, failure):
    service.plan = [failure]
    scorer = client(service)
    assert [math.nan, 0.05] == values(scorer(["p", "p"], ["four", "fives"]))
    assert len(service.requests) == 2 and scorer.last_failure.startswith("status ")


def test_a_failure_that_lasts_stays_a_failure(service, capsys):
    clock = Clock()
    service.plan = [send(503)] * 4
    scorer = client(service, clock, retries=3)
    result = scorer(["p", "p"], ["four", "fives"])
    assert [math.nan, 0.05] == values(result) and result["perspective"].labels == [None, None]
    assert len(service.requests) == 5 and scorer.last_failure == "status 503"
    service.plan = [send(503)] * 4
    scorer(["p"], ["six..."])
    assert capsys.readouterr().err.count("responses stay without a score: status 503") == 1


def test_a_service_that_is_gone_stops_the_run_so_that_it_can_go_on(service):
    scorer = client(service, retries=1)
    texts = [f"answer {number}" for number in range(12)]
    service.plan = [send(503)] * 18  # nine requests with their retries: one short of the bound
    assert sum(map(math.isnan, values_of(scorer(["p"] * 12, texts)))) == 9, "then there is an answer"
    service.plan = [send(200, b"garbage")] * 100
    with pytest.raises(
        UserError, match="no answer to 10 requests in a row, each tried 2 times .an answer that"
    ) as caught:
        scorer(["p"] * 12, texts)
    assert caught.value.exit_code == 75 and len(service.plan) == 80, "no request beyond the bound"


def values_of(result):
    return result["perspective"].values


def test_backoff_doubles_within_bounds(service):
    clock = Clock()
    service.plan = [send(500)] * 9
    client(service, clock, retries=9, requests_per_second=1000)(["p"], ["four"])
    waits = [wait for wait in clock.waits if wait >= 0.4]
    bounds = [(0.5, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (30, 60), (30, 60), (30, 60)]
    assert len(waits) == 9
    assert all(low <= wait <= high for wait, (low, high) in zip(waits, bounds, strict=True))


def test_retry_after_is_honoured(service):
    clock = Clock()
    service.plan = [send(429, Retry_After="17")]
    client(service, clock)(["p"], ["four"])
    assert any(17 <= wait < 18 for wait in clock.waits)


def test_retry_after_as_a_date():
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    for text in (email.utils.format_datetime(later, usegmt=True), later.strftime("%a, %d %b %Y %H:%M:%S -0000")):
        assert 85 < perspective._retry_after({"Retry-After": text}) <= 90
    past = email.utils.format_datetime(later - datetime.timedelta(days=1), usegmt=True)
    assert [perspective._retry_after({"Retry-After": text}) for text in (past, "", "-5", "soon", "nan")] == [0.0] * 5


def test_a_long_wait_gives_rows_up_and_sends_nothing_meanwhile(service):
    clock = Clock()
    service.plan = [send(429, Retry_After="7200")]
    scorer = client(service, clock)
    assert [math.nan, math.nan] == values(scorer(["p", "p"], ["four", "fives"]))
    assert len(service.requests) == 1 and clock.now < 10
    clock.now += 7200
    assert values(scorer(["p"], ["fives"])) == [0.05]


@pytest.mark.parametrize("rate", [1.0, 4, 0.25])
def test_the_rate_is_never_exceeded(service, rate):
    clock = Clock()
    sent = []
    service.plan = [lambda handler, body: (sent.append(clock.now), score(handler, body))] * 6
    scorer = client(service, clock, requests_per_second=rate)
    assert scorer.requests_per_second == rate
    scorer._threads = 1  # this clock passes by sleeping, so threads would pass it for each other
    scorer(["p"] * 6, ["a" * n for n in range(1, 7)])
    assert [later - earlier for earlier, later in zip(sent, sent[1:], strict=False)] == pytest.approx([1 / rate] * 5)


def test_threads_share_the_rate(service):
    scorer = Perspective(endpoint=service.url, today=lambda: EARLY, requests_per_second=100)
    responses, began = ["a" * n for n in range(1, 41)], time.monotonic()
    assert [n / 100 for n in range(1, 41)] == values(scorer(["p"] * 40, responses))
    assert time.monotonic() - began >= 39 / 100 and scorer.requests == 40


def test_a_wrong_key_is_one_line_without_the_key(service, capsys):
    for failure in (send(403), send(401), send(400, '{"error": {"details": [{"reason": "API_KEY_INVALID"}]}}')):
        service.plan = [failure]
        with pytest.raises(UserError, match=f"refuses the key in {perspective.KEY}") as caught:
            client(service)(["p"], ["four"])
        assert SECRET not in str(caught.value)
    assert SECRET not in "".join(capsys.readouterr())


def test_a_key_that_was_accepted_and_then_is_not_costs_rows_but_not_the_run(service):
    service.plan = [score, send(403)]
    assert [0.04, math.nan] == values(client(service)(["p", "p"], ["four", "fives"]))


def test_a_redirect_never_takes_the_key_along(service):
    other = Service()
    try:
        for status in (301, 302, 303, 307, 308):
            service.plan.append(send(status, Location=other.url))
        scorer = client(service)
        scorer(["p"] * 5, ["a", "b", "c", "d", "e"])
        assert other.requests == [] and len(service.requests) == 5
    finally:
        other.server.shutdown()
        other.server.server_close()


def test_no_service_there(service):
    service.server.shutdown()
    service.server.server_close()
    scorer = client(service, retries=1)
    assert [math.nan] == values(scorer(["p"], ["four"]))
    assert scorer.last_failure.startswith("no answer")


def test_a_service_that_hangs(service, monkeypatch):
    monkeypatch.setattr(perspective, "_TIMEOUT", 0.05)
    free = threading.Event()
    service.plan = [lambda handler, body: free.wait(5)]
    assert values(client(service)(["p"], ["four"])) == [0.04]
    free.set()


def test_no_key_is_one_line(service, monkeypatch):
    for value in ("", "  ", "a\nb", "é"):
        monkeypatch.setenv(perspective.KEY, value)
        with pytest.raises(UserError, match=f"{perspective.KEY} is not set"):
            client(service)
    monkeypatch.delenv(perspective.KEY)
    with pytest.raises(UserError, match=f"{perspective.KEY} is not set"):
        client(service)


@pytest.mark.parametrize(
    "settings",
    [
        {"attributes": ()},
        {"attributes": ("TOXICITY", "toxicity")},
        {"attributes": ("TOXI CITY",)},
        {"requests_per_second": 0.0},
        {"requests_per_second": math.nan},
        {"retries": -1},
    ],
)
def test_wrong_settings_are_one_line(service, settings):
    with pytest.raises(UserError, match="perspective: "):
        client(service, **settings)


def test_the_end_of_the_service(service, capsys):
    last = datetime.date(2026, 12, 31)
    Perspective(today=lambda: last)
    warning = capsys.readouterr().err
    assert "ends on 2026-12-31 (in 0 days)" in warning and SECRET not in warning
    with pytest.raises(UserError, match="ended on 2026-12-31; use a toxicity classifier"):
        Perspective(today=lambda: last + datetime.timedelta(days=1))


def test_scores_are_kept_on_disk_and_failures_are_not(service, tmp_path):
    service.plan = [score, send(400)]
    scorer = cached(client(service), ScoreCache(tmp_path))
    assert [0.04, math.nan] == values(scorer(["p", "p"], ["four", "fives"]))
    again = cached(client(service), ScoreCache(tmp_path))
    assert values(again(["another", "p"], ["four", "fives"])) == [0.04, 0.05]
    assert len(service.requests) == 3 and (again.hits, again.misses) == (1, 1)
    assert SECRET not in "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
