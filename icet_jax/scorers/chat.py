"""A judge behind an OpenAI-compatible chat endpoint (metric "asr"): any model that vLLM or a provider serves.

Prompt and response are sent to the endpoint in the judge's template, and the first word of its response is the verdict.
A key is read from the environment, sent in a header and never written anywhere. Wrap the judge in
`icet_jax.scorers.cache.cached`.
"""

import datetime
import email.utils
import hashlib
import http.client
import ipaddress
import json
import math
import os
import random
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from icet_jax.errors import RESUMABLE, UserError, one_line
from icet_jax.files import JsonObject, parse_json
from icet_jax.parallel.distributed import on_first
from icet_jax.scorers.base import Scores, metric_name
from icet_jax.scorers.decoder_judge import word_verdict
from icet_jax.scorers.prompts import Render, judge_words, named_or_text, probe_text
from icet_jax.scorers.source import Entry
from icet_jax.scorers.transport import LARGEST_ANSWER, post

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds before the first retry, doubled each time up to the second number
_LONGEST_RETRY_AFTER = 300.0  # if the server asks to wait longer (seconds), the row is given up
_RETRIED = (408, 429, *range(500, 600))
_LOST = 10  # consecutive requests that failed in spite of retries, after which the endpoint counts as gone
_MOST_THREADS = 16
# Texts that the tokenizers of served models may read as the beginning or the end of a message.
_SPECIAL = re.compile(
    r"<(?=[|\uff5c]|/?(?:s|bos|eos|pad|think|(?:start|end)_of_turn)>|</?SYS>>)|\[(?=/?INST\])", re.IGNORECASE
)


class _Failed(Exception):
    """Raised for a request without a usable response; `wait` is the seconds that the server asks for, None if retries
    are useless."""

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Chat:
    """Asks a served model whether a response is unsafe: value 1 or 0, NaN if it gives no verdict or no response.

    Text of prompt or response that looks like a special token of a chat template gets a space (`<|eot_id|>` becomes `<
    |eot_id|>`), as `Conversations` does for the tokenizers that it knows.

    Attributes:
      name: name of the model, in the form of metric names.
      fingerprint: hash of the endpoint and the question, without the key.
      requests_per_second: most requests that all processes of a run send together.
      requests: number of requests sent.
      last_failure: why the latest row without a score has none; None if all have one.
    """

    metric = "asr"
    remote = True

    def __init__(
        self,
        endpoint: str,
        model: str,
        render: Render,
        *,
        words: tuple[str, str] = ("unsafe", "safe"),
        max_new_tokens: int = 16,
        timeout: float | int = 30.0,
        retries: int = 5,
        requests_per_second: float | int = 4.0,
        key_variable: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Reads the key from the environment; nothing is sent yet.

        Args:
          endpoint: http or https URL before "/chat/completions", such as "http://localhost:8000/v1".
          model: name of the model at the endpoint.
          render: function of prompt and response that returns the user's message.
          words: words that the model answers for unsafe and for safe.
          max_new_tokens: most tokens of its response.
          timeout: seconds for one request, from the connection to the last byte of the response.
          retries: number of retries of one request after a temporary failure.
          requests_per_second: never exceeded.
          key_variable: environment variable that holds the key; None sends no key.
          clock, sleep: functions that return monotonic seconds and that wait.

        Raises:
          UserError: a setting is invalid, or the variable holds no key.
        """
        self._url, host = _completions(endpoint)
        self._direct = _is_local(host)
        self.name = metric_name(model)
        if not self.name:
            raise UserError(f"model {model!r} must be a name that holds a letter or digit")
        if words[0].strip().lower() == words[1].strip().lower():
            raise UserError(f"unsafe and safe are both {words[0]!r}, but must differ")
        for name, value in (("timeout", timeout), ("requests_per_second", requests_per_second)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} is {value!r}, but must be above 0")
        if timeout > threading.TIMEOUT_MAX:
            raise UserError(f"timeout is {timeout!r}, but must be seconds")
        for name, count, least in (("retries", retries, 0), ("max_new_tokens", max_new_tokens, 1)):
            if count < least:
                raise UserError(f"{name} is {count!r}, but must be {least} or more")
        self._key_variable, self._key = key_variable, _key(key_variable)
        self._model, self._render, self._words = model, render, words
        self._tokens, self._timeout, self._retries = max_new_tokens, timeout, retries
        asked = json.dumps([self._url, self._body(probe_text(render)), words])
        self.fingerprint = hashlib.sha256(asked.encode()).hexdigest()[:16]
        self._context = ssl.create_default_context()
        self._clock, self._sleep = clock, sleep
        self.requests_per_second = float(requests_per_second)
        self._next = self._closed_until = -math.inf
        self._threads = min(_MOST_THREADS, math.ceil(requests_per_second))
        self._lock, self._accepted = threading.Lock(), False
        self.requests = 0
        self.last_failure: str | None = None
        self._consecutive_failures = 0
        self._reported_failures: set[str | None] = set()
        if not self._direct:
            print(one_line(f"icet-jax: {self.name}: prompts and responses are sent to {host}"), file=sys.stderr)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Judges B responses; equal pairs are sent once, by one process.

        Raises:
          UserError: the endpoint rejects the key (before it has accepted it once), or has failed ten requests in a row,
            each with all of its retries. A run that stops for this reason continues from its transcripts.
        """
        pairs = list(zip(prompts, responses, strict=True))
        distinct = list(dict.fromkeys(pairs))
        verdicts = dict(zip(distinct, on_first(lambda: self._ask_all(distinct)), strict=True))
        values = [math.nan if verdicts[pair] is None else float(verdicts[pair][0]) for pair in pairs]
        labels = [None if verdicts[pair] is None else verdicts[pair][1] for pair in pairs]
        return {self.name: Scores(np.array(values, np.float32), labels)}

    def _ask_all(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            verdicts = list(pool.map(self._judge_pair, pairs))
        if self._consecutive_failures >= _LOST:
            raise UserError(
                f"{self.name}: no usable answer from {self._url} to {self._consecutive_failures} requests in a row, "
                f"with up to {self._retries} retries each ({self.last_failure}); repeat the command when it answers",
                exit_code=RESUMABLE,
            )
        return verdicts

    def _judge_pair(self, pair: tuple[str, str]) -> tuple[bool, str] | None:
        """Returns one response's verdict and its word; None after the last failure."""
        if self._consecutive_failures >= _LOST:
            return None
        for attempt in range(self._retries + 1):
            if self._clock() < self._closed_until:
                self._consecutive_failures += 1
                break
            try:
                verdict = self._ask(pair)
                self._consecutive_failures = 0
                return verdict
            except _Failed as failure:
                self.last_failure = str(failure)
                if (
                    failure.wait is None
                ):  # the endpoint works but rejects this request, unless it has never worked at all
                    self._consecutive_failures = 0 if self._accepted else self._consecutive_failures + 1
                    break
                if attempt == self._retries:
                    self._consecutive_failures += 1
                    break
                if failure.wait > _LONGEST_RETRY_AFTER:
                    self._closed_until = self._clock() + failure.wait  # no requests are sent until then
                    break
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
                self._sleep(max(failure.wait, backoff * random.uniform(0.5, 1.0)))
        self._report_failure()
        return None

    def _report_failure(self) -> None:
        """Prints why responses have no score, once for each reason."""
        with self._lock:
            new = self.last_failure not in self._reported_failures
            self._reported_failures.add(self.last_failure)
        if new:
            print(f"icet-jax: {self.name}: responses stay without a score: {self.last_failure}", file=sys.stderr)

    def _ask(self, pair: tuple[str, str]) -> tuple[bool, str]:
        """Sends one request and returns the verdict and its word.

        Raises:
          _Failed: there is no usable response.
          UserError: the key is rejected.
        """
        body = json.dumps(self._body(self._render(*map(_neutralise, pair)))).encode()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._take_turn()
        try:
            answer = post(self._url, body, headers, self._timeout, context=self._context, direct=self._direct)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status_error(error) from None
        except TimeoutError:
            raise _Failed(f"no whole answer in {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # URLError only wraps the cause
            raise _Failed(f"no answer ({type(cause).__name__})") from None
        if len(answer) > LARGEST_ANSWER:
            raise _Failed(f"an answer of more than {LARGEST_ANSWER} bytes")
        verdict = word_verdict(_content(answer), *self._words)
        self._accepted = True
        if verdict is None:
            raise _Failed("an answer that begins with neither verdict word", None)
        return verdict

    def _take_turn(self) -> None:
        """Waits until the rate limit allows one more request; threads are served one after another."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + 1 / self.requests_per_second
            self.requests += 1
        if turn > now:
            self._sleep(turn - now)

    def _body(self, text: str) -> JsonObject:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._tokens,
            "temperature": 0,
        }

    def _status_error(self, error: urllib.error.HTTPError) -> Exception:
        """Returns the error for an HTTP status; the body is not read because it could repeat the texts."""
        if error.code in (401, 403) and not self._accepted:
            if self._key_variable is None:
                return UserError(
                    f"{self._url} asks for a key (status {error.code}); put it into an environment variable and name "
                    "that in key_variable"
                )
            return UserError(f"{self._url} refuses the key in {self._key_variable} (status {error.code}); check it")
        return _Failed(f"status {error.code}", _retry_after(error.headers) if error.code in _RETRIED else None)


def _completions(endpoint: str) -> tuple[str, str]:
    """Returns the URL for requests, and its host.

    Raises:
      UserError: the endpoint is not an http or https URL, or has more than scheme, host, port and path. A name and
        password in it are not repeated in the message.
    """
    try:
        parts = urllib.parse.urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        raise UserError("endpoint is no URL; give one such as http://localhost:8000/v1") from None
    if "@" in parts.netloc:
        raise UserError("endpoint holds a name or password; give the key in the variable that key_variable names")
    plain = endpoint.isascii() and endpoint.isprintable() and " " not in endpoint
    if parts.scheme not in ("http", "https") or not host or not plain or parts.query or parts.fragment:
        raise UserError(f"endpoint {endpoint!r} must be an http or https URL such as http://localhost:8000/v1")
    return endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions", host


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(variable: str | None) -> str | None:
    """Returns the key in an environment variable; None if no variable is named.

    Raises:
      UserError: the name is not that of a variable (the text could be the key and is not repeated), or it holds no key.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError("key_variable must be the name of an environment variable in capitals, not the key itself")
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"key_variable: {variable} is not set in the environment (or is no key); set it to the key")
    return key


def _neutralise(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"{found.group()} ", text)


def _content(answer: bytes) -> str:
    """Returns the text of a chat completion; empty if the model gave none.

    Raises:
      _Failed: the response is not a chat completion.
    """
    try:
        content = parse_json(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
        raise _Failed("an answer that is no chat completion") from None
    if content is not None and not isinstance(content, str):
        raise _Failed("an answer that is no chat completion")
    return content or ""


def _retry_after(headers: Any) -> float:
    """Returns the seconds that a Retry-After header asks for, as a number or a date; 0 without a usable header."""
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


def load_chat(
    *, endpoint: str, model: str, template: str, unsafe: str | None = None, safe: str | None = None, **fields: Any
) -> Chat:
    """Creates a judge behind a chat endpoint.

    Args:
      endpoint, model: see `Chat`.
      template: text with `{prompt}` and `{response}`, or the name of a built-in text, as for a decoder judge.
      unsafe, safe: words that it answers; if None those of the template, or "unsafe" and "safe".
      fields: further arguments of `Chat`.

    Raises:
      UserError: see `named_or_text` and `Chat`.
    """
    return Chat(endpoint, model, named_or_text(template), words=judge_words(template, unsafe, safe), **fields)


def make_scorer(entry: Entry, **fields: Any) -> Chat:
    """Returns the judge that an entry of `config.scorers` describes; see `load_chat`."""
    return load_chat(**fields)
