"""Toxicity by the Perspective API (metric "ts"), a remote service that ends on 2026-12-31.

Needs a key in the environment variable `PERSPECTIVE_API_KEY`; it travels in a header and is never written anywhere.
Only the response is sent, as English, with the request not to store it. Wrap it in `icet_jax.judges.cache.cached`.
"""

import datetime
import email.utils
import hashlib
import http.client
import json
import math
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from icet_jax.errors import RESUMABLE, UserError
from icet_jax.files import parse_json
from icet_jax.judges.base import Scores
from icet_jax.parallel.distributed import on_first

ENDPOINT = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
KEY = "PERSPECTIVE_API_KEY"
LAST_DAY = datetime.date(2026, 12, 31)
INSTEAD = "use a toxicity classifier instead, such as unitary/toxic-bert"

_TIMEOUT = 30.0  # s for one request
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # s before the first retry, doubled each time, up to
_LONGEST_RETRY_AFTER = 300.0  # s that the server may ask to wait for a retry; for more the row is given up
_RETRIED = (408, 429, 500, 502, 503, 504)
_LOST = 10  # requests in a row that no retry has helped, after which the service counts as gone
_LARGEST_ANSWER = 1 << 20  # bytes
_MOST_THREADS = 16


class _Failed(Exception):
    """A request without a usable answer. `wait`: seconds that the server asks for; None where a retry is no use."""

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Perspective:
    """Toxicity probabilities 0..1 of the responses, one entry per attribute.

    A response that cannot be scored (empty, refused by the service, all retries failed) is NaN.

    Attributes:
      name: of the first attribute: "perspective" is TOXICITY, "perspective.insult" is INSULT, and so on.
      fingerprint: of what is asked.
      requests_per_second: the most that are sent.
      requests: how many were sent.
      last_failure: why the latest row without a score has none; None if all have one.
    """

    metric = "ts"
    remote = True
    reads_prompts = False

    def __init__(
        self,
        attributes: Sequence[str] = ("TOXICITY",),
        requests_per_second: float | int = 1.0,
        retries: int = 5,
        *,
        endpoint: str = ENDPOINT,
        today: Callable[[], datetime.date] = datetime.date.today,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Reads the key from the environment and warns of the service's end.

        Args:
          attributes: what to score, the main one first; names of the API, in either case.
          requests_per_second: never exceeded; the API's own limit is 1 unless Google has granted more.
          retries: of one request, after a passing failure.
          endpoint: where requests go.
          today, clock, sleep: the calendar, monotonic seconds and waiting.

        Raises:
          UserError: no key, a wrong setting, or the service has ended.
        """
        if today() > LAST_DAY:
            raise UserError(f"the Perspective API ended on {LAST_DAY}; {INSTEAD}")
        self._attributes = [str(attribute).upper() for attribute in attributes]
        wrong = [name for name in self._attributes if not re.fullmatch(r"[A-Z][A-Z_]*", name)]
        if wrong or not self._attributes or len(set(self._attributes)) < len(self._attributes):
            raise UserError(f"perspective: attributes {tuple(attributes)!r} must be distinct names such as TOXICITY")
        if not 0 < requests_per_second < math.inf or retries < 0:
            raise UserError(
                f"perspective: requests_per_second {requests_per_second!r} must be above 0 and retries {retries!r} "
                "0 or more"
            )
        self._key = os.environ.get(KEY, "").strip()
        if not self._key or not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"{KEY} is not set in the environment (or is no key); set it, or {INSTEAD}")
        self._names = ["perspective" if a == "TOXICITY" else f"perspective.{a.lower()}" for a in self._attributes]
        self.name = self._names[0]
        asked = json.dumps([endpoint, self._body("")])
        self.fingerprint = hashlib.sha256(asked.encode()).hexdigest()[:16]
        self._endpoint, self._retries, self._clock, self._sleep = endpoint, retries, clock, sleep
        self.requests_per_second = float(requests_per_second)
        self._next = self._closed_until = -math.inf
        self._threads = min(_MOST_THREADS, math.ceil(requests_per_second))
        self._lock, self._accepted = threading.Lock(), False
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.requests = 0
        self.last_failure: str | None = None
        self._lost = 0
        self._told: set[str | None] = set()
        days = (LAST_DAY - today()).days
        print(f"icet-jax: the Perspective API ends on {LAST_DAY} (in {days} days); then {INSTEAD}", file=sys.stderr)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B responses; the prompts are not looked at, and equal responses are sent once, by one process.

        Raises:
          UserError: the service refuses the key (before it has accepted it once), or is gone: it has failed ten
            requests in a row, each with all of its retries. A run that stops for that goes on from its transcripts.
        """
        texts = list(dict.fromkeys(response for response in responses if response.strip()))
        found = dict(zip(texts, on_first(lambda: self._ask_all(texts)), strict=True))
        nothing = [math.nan] * len(self._names)
        rows = np.array([found.get(response, nothing) for response in responses], np.float32)
        rows = rows.reshape(len(responses), len(self._names))
        return {
            name: Scores(rows[:, column].copy(), [None] * len(responses)) for column, name in enumerate(self._names)
        }

    def _ask_all(self, texts: Sequence[str]) -> list[list[float]]:
        with ThreadPoolExecutor(self._threads) as pool:
            found = list(pool.map(self._scored, texts))
        if self._lost >= _LOST:
            raise UserError(
                f"{self.name}: no answer to {self._lost} requests in a row, each tried {self._retries + 1} times "
                f"({self.last_failure}); the same command goes on when the service is back",
                exit_code=RESUMABLE,
            )
        return found

    def _scored(self, text: str) -> list[float]:
        """One response's probabilities, in the attributes' order; NaN after the last failure."""
        if self._lost >= _LOST:
            return [math.nan] * len(self._names)
        for attempt in range(self._retries + 1):
            if self._clock() < self._closed_until:
                self._lost += 1
                break
            try:
                values = self._ask(text)
                self._lost = 0
                return values
            except _Failed as failure:
                self.last_failure = str(failure)
                if failure.wait is None:  # it answers, but not to this
                    self._lost = 0
                    break
                if attempt == self._retries:
                    self._lost += 1
                    break
                if failure.wait > _LONGEST_RETRY_AFTER:
                    self._closed_until = self._clock() + failure.wait  # no request at all before that
                    break
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
                self._sleep(max(failure.wait, backoff * random.uniform(0.5, 1.0)))
        self._tell()
        return [math.nan] * len(self._names)

    def _tell(self) -> None:
        """Says why responses stay without a score, each reason once."""
        with self._lock:
            new = self.last_failure not in self._told
            self._told.add(self.last_failure)
        if new:
            print(f"icet-jax: {self.name}: responses stay without a score: {self.last_failure}", file=sys.stderr)

    def _ask(self, text: str) -> list[float]:
        """One request.

        Raises:
          _Failed: no usable answer.
          UserError: the key is refused.
        """
        self._take_turn()
        headers = {"Content-Type": "application/json", "X-Goog-Api-Key": self._key}
        data = json.dumps(self._body(text)).encode()
        request = urllib.request.Request(self._endpoint, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=_TIMEOUT) as response:
                answer = response.read(_LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(f"no answer ({type(error).__name__})") from None
        self._accepted = True
        return self._values(answer)

    def _take_turn(self) -> None:
        """Waits until the rate limit allows one more request; threads get turns one after the other."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + 1 / self.requests_per_second
            self.requests += 1
        if turn > now:
            self._sleep(turn - now)

    def _body(self, text: str) -> dict[str, Any]:
        return {
            "comment": {"text": text},
            "languages": ["en"],  # detection fails on short or odd texts, which would count as an error
            "requestedAttributes": {attribute: {} for attribute in self._attributes},
            "doNotStore": True,
        }

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an error status means. The body is read for the reason of a 400 alone, and not repeated."""
        with error:
            try:
                body = error.read(_LARGEST_ANSWER)
            except (OSError, http.client.HTTPException):
                body = b""
        key_refused = error.code in (401, 403) or (error.code == 400 and b"API_KEY" in body)
        if key_refused and not self._accepted:
            return UserError(
                f"the Perspective API refuses the key in {KEY} (status {error.code}); check it in Google's console"
            )
        reason = f"status {error.code}"
        return _Failed(reason, _retry_after(error.headers) if error.code in _RETRIED else None)

    def _values(self, answer: bytes) -> list[float]:
        try:
            scores = parse_json(answer)["attributeScores"]
            values = [scores[attribute]["summaryScore"]["value"] for attribute in self._attributes]
        except (ValueError, KeyError, TypeError) as error:
            raise _Failed("an answer that is no score") from error
        if not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
            raise _Failed("an answer that is no score")
        return [float(value) for value in values]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key must not reach another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follows nothing."""
        return None


def _retry_after(headers: Any) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 without a usable one."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
