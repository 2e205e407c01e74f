"""A judge behind an OpenAI-compatible chat endpoint (metric "asr"): any model that vLLM or a provider serves.

Prompt and response are sent to the endpoint in the judge's template, and the first word of its answer is the verdict.
A key comes from the environment, travels in a header and is never written anywhere. Wrap the judge in
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
from icet_jax.files import parse_json
from icet_jax.parallel.distributed import on_first
from icet_jax.scorers.base import Scores, metric_name
from icet_jax.scorers.decoder_judge import word_verdict
from icet_jax.scorers.prompts import Render, probe_text
from icet_jax.scorers.transport import LARGEST_ANSWER, post

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # s before the first retry, doubled each time, up to
_LONGEST_RETRY_AFTER = 300.0  # s that the server may ask to wait for a retry; for more the row is given up
_RETRIED = (408, 429, *range(500, 600))
_LOST = 10  # requests in a row that no retry has helped, after which the endpoint counts as gone
_MOST_THREADS = 16
# What the tokenizers of served models may read as the end of a message, or as the start of one.
_SPECIAL = re.compile(
    r"<(?=[|\uff5c]|/?(?:s|bos|eos|pad|think|(?:start|end)_of_turn)>|</?SYS>>)|\[(?=/?INST\])", re.IGNORECASE
)


class _Failed(Exception):
    """A request without a usable answer. `wait`: seconds that the server asks for; None where a retry is no use."""

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Chat:
    """Asks a served model whether a response is unsafe: value 1 or 0, NaN where its answer is no verdict or none came.

    Text of prompt or response that looks like a special token of a chat template has a space put into it
    (`<|eot_id|>` becomes `< |eot_id|>`), as `Conversations` does for the tokenizers that it knows.

    Attributes:
      name: that of the model, in metric-name form.
      fingerprint: of the endpoint and of what is asked; not of the key.
      requests_per_second: the most that are sent by all processes of a run.
      requests: how many were sent.
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
          endpoint: http or https URL in front of "/chat/completions", such as "http://localhost:8000/v1".
          model: its name there.
          render: prompt and response -> the user's message.
          words: that it answers for unsafe and for safe.
          max_new_tokens: the longest answer.
          timeout: seconds for one request, from the connection to the last byte of the answer.
          retries: of one request, after a passing failure.
          requests_per_second: never exceeded.
          key_variable: environment variable that holds the key; None sends no key.
          clock, sleep: monotonic seconds and waiting.

        Raises:
          UserError: a setting that cannot be, or no key in the variable.
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
        self._lost = 0
        self._told: set[str | None] = set()
        if not self._direct:
            print(one_line(f"icet-jax: {self.name}: prompts and responses are sent to {host}"), file=sys.stderr)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Judges B responses; equal pairs are sent once, by one process.

        Raises:
          UserError: the endpoint refuses the key (before it has accepted it once), or is gone: it has failed ten
            requests in a row, each with all of its retries. A run that stops for that goes on from its transcripts.
        """
        pairs = list(zip(prompts, responses, strict=True))
        distinct = list(dict.fromkeys(pairs))
        found = dict(zip(distinct, on_first(lambda: self._ask_all(distinct)), strict=True))
        values = [math.nan if found[pair] is None else float(found[pair][0]) for pair in pairs]
        labels = [None if found[pair] is None else found[pair][1] for pair in pairs]
        return {self.name: Scores(np.array(values, np.float32), labels)}

    def _ask_all(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            found = list(pool.map(self._judged, pairs))
        if self._lost >= _LOST:
            raise UserError(
                f"{self.name}: no usable answer from {self._url} to {self._lost} requests in a row, with up to "
                f"{self._retries} retries each ({self.last_failure}); the same command goes on when it answers",
                exit_code=RESUMABLE,
            )
        return found

    def _judged(self, pair: tuple[str, str]) -> tuple[bool, str] | None:
        """One response's verdict and its word; None after the last failure."""
        if self._lost >= _LOST:
            return None
        for attempt in range(self._retries + 1):
            if self._clock() < self._closed_until:
                self._lost += 1
                break
            try:
                verdict = self._ask(pair)
                self._lost = 0
                return verdict
            except _Failed as failure:
                self.last_failure = str(failure)
                if failure.wait is None:  # it answers, but not to this; what has never answered may be no such endpoint
                    self._lost = 0 if self._accepted else self._lost + 1
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
        return None

    def _tell(self) -> None:
        """Says why responses stay without a score, each reason once."""
        with self._lock:
            new = self.last_failure not in self._told
            self._told.add(self.last_failure)
        if new:
            print(f"icet-jax: {self.name}: responses stay without a score: {self.last_failure}", file=sys.stderr)

    def _ask(self, pair: tuple[str, str]) -> tuple[bool, str]:
        """One request.

        Raises:
          _Failed: no usable answer.
          UserError: the key is refused.
        """
        body = json.dumps(self._body(self._render(*map(_defused, pair)))).encode()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._take_turn()
        try:
            answer = post(self._url, body, headers, self._timeout, context=self._context, direct=self._direct)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except TimeoutError:
            raise _Failed(f"no whole answer in {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # URLError says only that there was a cause
            raise _Failed(f"no answer ({type(cause).__name__})") from None
        if len(answer) > LARGEST_ANSWER:
            raise _Failed(f"an answer of more than {LARGEST_ANSWER} bytes")
        verdict = word_verdict(_content(answer), *self._words)
        self._accepted = True
        if verdict is None:
            raise _Failed("an answer that begins with neither verdict word", None)
        return verdict

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
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._tokens,
            "temperature": 0,
        }

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an error status means; the body, which could repeat the texts, is not read."""
        if error.code in (401, 403) and not self._accepted:
            if self._key_variable is None:
                return UserError(
                    f"{self._url} asks for a key (status {error.code}); put it into an environment variable and name "
                    "that in key_variable"
                )
            return UserError(f"{self._url} refuses the key in {self._key_variable} (status {error.code}); check it")
        return _Failed(f"status {error.code}", _retry_after(error.headers) if error.code in _RETRIED else None)


def _completions(endpoint: str) -> tuple[str, str]:
    """The URL that requests go to, and its host.

    Raises:
      UserError: it is no http or https URL, or holds more than scheme, host, port and path. A name and password in it
        are not repeated.
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
    """The key in an environment variable; None where no variable is named.

    Raises:
      UserError: no name of a variable (the text could be the key, and is not repeated), or no key in it.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError("key_variable must be the name of an environment variable in capitals, not the key itself")
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"key_variable: {variable} is not set in the environment (or is no key); set it to the key")
    return key


def _defused(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"{found.group()} ", text)


def _content(answer: bytes) -> str:
    """The text of a chat completion; empty where the model gave none.

    Raises:
      _Failed: it is no chat completion.
    """
    try:
        content = parse_json(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
        raise _Failed("an answer that is no chat completion") from None
    if content is not None and not isinstance(content, str):
        raise _Failed("an answer that is no chat completion")
    return content or ""


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
