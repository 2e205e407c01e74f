"""A judge behind an OpenAI-compatible chat endpoint (metric "asr"): any model that vLLM or a provider serves.

Prompt and response are sent to the endpoint in the judge's template. The first word of the endpoint's answer is the
verdict. An API key is read from the environment, sent in a header and never written anywhere. Wrap the judge in
`icet_jax.scorers.cache.cached`, so that no pair is sent twice.
"""

import datetime
import email.message
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from icet_jax.errors import RESUMABLE, UserError, one_line
from icet_jax.files import JsonObject, parse_json
from icet_jax.parallel.distributed import on_first
from icet_jax.scorers.base import Scores, metric_name
from icet_jax.scorers.decoder_judge import Verdict, word_verdict
from icet_jax.scorers.prompts import Render, judge_words, named_or_text, probe_text
from icet_jax.scorers.source import Entry
from icet_jax.scorers.transport import LARGEST_ANSWER, post

_FIRST_WAIT = 1.0  # seconds before the first retry, doubled for each further retry
_LONGEST_WAIT = 60.0  # seconds; the wait is not doubled beyond this
_LONGEST_RETRY_AFTER = 300.0  # seconds; if the server asks to wait longer, the row stays without a score
_RETRIED_STATUSES = (408, 429, *range(500, 600))
_MAX_CONSECUTIVE_FAILURES = 10  # once this many pairs in a row have failed in spite of retries, nothing more is sent
_MOST_THREADS = 16
# Texts that the tokenizers of served models may read as the beginning or the end of a message.
_SPECIAL = re.compile(
    r"<(?=[|\uff5c]|/?(?:s|bos|eos|pad|think|(?:start|end)_of_turn)>|</?SYS>>)|\[(?=/?INST\])", re.IGNORECASE
)


class _RequestFailed(Exception):
    """Raised for a request without a usable answer.

    Attributes:
      wait: seconds that the server asks to wait before a retry, 0 if it names none; None if retries are useless.
    """

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Chat:
    """Asks a served model whether a response is unsafe: value 1 or 0, NaN without a verdict.

    Text of prompt or response that looks like a special token of a chat template gets a space (`<|eot_id|>` becomes
    `< |eot_id|>`), so that a response cannot end its own message. `Conversations` does the same for known tokenizers.

    Attributes:
      name: name of the model, in the form of metric names.
      fingerprint: hash of the URL, a request with placeholder texts, and the verdict words; it does not cover the key.
      requests_per_second: largest number of requests per second that all processes of a run send together.
      requests: number of requests sent so far.
      last_failure: why the last row that got no score did not get one; None if all rows got one.
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
        """Reads the API key from the environment; nothing is sent yet.

        Args:
          endpoint: http or https URL before "/chat/completions", such as "http://localhost:8000/v1".
          model: name of the model at the endpoint.
          render: function of prompt and response that returns the message to send.
          words: (the judge's word for an unsafe response, its word for a safe response).
          max_new_tokens: largest number of tokens of the judge's answer.
          timeout: seconds for one request, from the connection to the last byte of the answer.
          retries: number of retries of one request after a temporary failure.
          requests_per_second: largest number of requests per second.
          key_variable: name of the environment variable that holds the API key; None sends no key.
          clock: function that returns a monotonic time in seconds.
          sleep: function that waits for the given number of seconds.

        Raises:
          UserError: a setting is invalid, or the variable holds no key.
        """
        self._url, host = _completions_url(endpoint)
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
        self._key_variable, self._key = key_variable, _read_key(key_variable)
        self._model, self._render, self._words = model, render, words
        self._max_new_tokens, self._timeout, self._retries = max_new_tokens, timeout, retries
        facts = json.dumps([self._url, self._request_body(probe_text(render)), words])
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self._context = ssl.create_default_context()
        self._clock, self._sleep = clock, sleep
        self.requests_per_second = float(requests_per_second)
        self._next_request_at = self._closed_until = -math.inf
        self._threads = min(_MOST_THREADS, math.ceil(requests_per_second))
        self._lock, self._was_accepted = threading.Lock(), False
        self.requests = 0
        self.last_failure: str | None = None
        self._consecutive_failures = 0
        self._reported_failures: set[str | None] = set()
        if not self._direct:
            print(one_line(f"icet-jax: {self.name}: prompts and responses are sent to {host}"), file=sys.stderr)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns the verdicts on B responses as {`name`: scores}; equal pairs are sent once, by the first process.

        Raises:
          UserError: the endpoint rejects the key without ever having accepted it, or ten pairs in a row have failed
            with all of their retries. A run that stops for this reason continues from its transcripts.
        """
        pairs = list(zip(prompts, responses, strict=True))
        distinct = list(dict.fromkeys(pairs))
        verdicts = dict(zip(distinct, on_first(lambda: self._ask_all(distinct)), strict=True))
        verdict_of_row = [verdicts[pair] for pair in pairs]
        values = [math.nan if verdict is None else float(verdict[0]) for verdict in verdict_of_row]
        labels = [None if verdict is None else verdict[1] for verdict in verdict_of_row]
        return {self.name: Scores(np.array(values, np.float32), labels)}

    def _ask_all(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict | None]:
        """Returns the verdict on each (prompt, response), None without one; raises as `__call__` does."""
        with ThreadPoolExecutor(self._threads) as pool:
            verdicts = list(pool.map(self._judge_pair, pairs))
        if self._consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
            raise UserError(
                f"{self.name}: no usable answer from {self._url} to {self._consecutive_failures} requests in a row, "
                f"with up to {self._retries} retries each ({self.last_failure}); repeat the command when it answers",
                exit_code=RESUMABLE,
            )
        return verdicts

    def _judge_pair(self, pair: tuple[str, str]) -> Verdict | None:
        """Sends one (prompt, response) to the judge, with retries, and returns the verdict.

        Returns None if no request got a usable answer. Once too many requests in a row have failed, nothing more is
        sent and the result is None too.
        """
        if self._consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
            return None
        for attempt in range(self._retries + 1):
            if self._clock() < self._closed_until:
                self._consecutive_failures += 1
                break
            try:
                verdict = self._ask(pair)
                self._consecutive_failures = 0
                return verdict
            except _RequestFailed as failure:
                self.last_failure = str(failure)
                if failure.wait is None:
                    # An endpoint that has answered before is working and rejects only this request.
                    self._consecutive_failures = 0 if self._was_accepted else self._consecutive_failures + 1
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

    def _ask(self, pair: tuple[str, str]) -> Verdict:
        """Sends one request for a (prompt, response) and returns the verdict.

        Raises:
          _RequestFailed: there is no usable answer.
          UserError: the key is rejected.
        """
        body = json.dumps(self._request_body(self._render(*map(_break_special_tokens, pair)))).encode()
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
            raise _RequestFailed(f"no whole answer in {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # URLError only wraps the cause
            raise _RequestFailed(f"no answer ({type(cause).__name__})") from None
        if len(answer) > LARGEST_ANSWER:
            raise _RequestFailed(f"an answer of more than {LARGEST_ANSWER} bytes")
        verdict = word_verdict(_completion_text(answer), *self._words)
        self._was_accepted = True
        if verdict is None:
            raise _RequestFailed("an answer that begins with neither verdict word", wait=None)
        return verdict

    def _take_turn(self) -> None:
        """Waits until the rate limit allows one more request; threads are served one after another."""
        with self._lock:
            now = self._clock()
            send_at = max(now, self._next_request_at)
            self._next_request_at = send_at + 1 / self.requests_per_second
            self.requests += 1
        if send_at > now:
            self._sleep(send_at - now)

    def _request_body(self, text: str) -> JsonObject:
        """Returns the JSON body of a request that asks for the answer to one message."""
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._max_new_tokens,
            "temperature": 0,
        }

    def _status_error(self, error: urllib.error.HTTPError) -> Exception:
        """Returns the error to raise for an HTTP status: a UserError for a rejected key, otherwise a _RequestFailed.

        The body is not read because it could repeat the texts.
        """
        if error.code in (401, 403) and not self._was_accepted:
            if self._key_variable is None:
                return UserError(
                    f"{self._url} asks for a key (status {error.code}); put it into an environment variable and name "
                    "that in key_variable"
                )
            return UserError(f"{self._url} refuses the key in {self._key_variable} (status {error.code}); check it")
        wait = _retry_after(error.headers) if error.code in _RETRIED_STATUSES else None
        return _RequestFailed(f"status {error.code}", wait)


def _completions_url(endpoint: str) -> tuple[str, str]:
    """Returns (URL that ends in "/chat/completions", host name) of an endpoint.

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
    """Returns whether a host name or IP address is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_key(variable: str | None) -> str | None:
    """Returns the API key in an environment variable; None if `variable` is None.

    Raises:
      UserError: `variable` is not a variable's name (it could be the key itself, so the message does not repeat it), or
        the variable holds no key.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError("key_variable must be the name of an environment variable in capitals, not the key itself")
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"key_variable: {variable} is not set in the environment (or is no key); set it to the key")
    return key


def _break_special_tokens(text: str) -> str:
    """Returns the text with a space inside everything that a tokenizer may read as the border of a message."""
    return _SPECIAL.sub(lambda match: f"{match.group()} ", text)


def _completion_text(answer: bytes) -> str:
    """Returns the text in the endpoint's answer; empty if the model generated none.

    Raises:
      _RequestFailed: the answer is not a chat completion.
    """
    try:
        content = parse_json(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
        raise _RequestFailed("an answer that is no chat completion") from None
    if content is not None and not isinstance(content, str):
        raise _RequestFailed("an answer that is no chat completion")
    return content or ""


def _retry_after(headers: Mapping[str, str] | email.message.Message) -> float:
    """Returns the seconds that a Retry-After header asks for, as a number or a date; 0 without a usable header."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        retry_at = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    if retry_at.tzinfo is None:
        retry_at = retry_at.replace(tzinfo=datetime.UTC)
    return max(0.0, (retry_at - datetime.datetime.now(datetime.UTC)).total_seconds())


def load_chat(
    *, endpoint: str, model: str, template: str, unsafe: str | None = None, safe: str | None = None, **fields: Any
) -> Chat:
    """Returns a judge behind a chat endpoint.

    Args:
      endpoint, model: see `Chat`.
      template: text with `{prompt}` and `{response}`, or a name in `icet_jax.scorers.prompts.BUILT_IN`.
      unsafe, safe: words with which the judge's answer begins; None for the words of a built-in template, otherwise
        "unsafe" and "safe".
      fields: further arguments of `Chat`.

    Raises:
      UserError: see `named_or_text` and `Chat`.
    """
    return Chat(endpoint, model, named_or_text(template), words=judge_words(template, unsafe, safe), **fields)


def make_scorer(entry: Entry, **fields: Any) -> Chat:
    """Returns the judge with these `fields` of an entry of `config.scorers`; see `load_chat`."""
    return load_chat(**fields)
