"""A POST request whose whole time and whole answer are bounded, for judges that other machines compute."""

import contextlib
import http.client
import queue
import socket
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from typing import Any

LARGEST_ANSWER = 1 << 20  # bytes


def post(
    url: str, body: bytes, headers: Mapping[str, str], seconds: float | int, *, context: ssl.SSLContext, direct: bool
) -> bytes:
    """The body of the answer to one request, at most one byte more than `LARGEST_ANSWER`; no redirect is followed.

    The request runs in a thread of its own. After `seconds` its sockets are shut, so that neither a name that does not
    resolve nor a server that sends a byte now and then holds the caller.

    Args:
      url: http or https.
      body, headers: of the request.
      seconds: for the connection, the request and the whole answer together.
      context: checks the server's certificate.
      direct: the proxies that the environment names are left out.

    Raises:
      TimeoutError: the answer was not complete in time.
      urllib.error.HTTPError: a status other than 2xx; its body is not read.
      OSError, http.client.HTTPException: no connection, or an answer that is not HTTP.
    """
    request = urllib.request.Request(url, body, dict(headers), method="POST")
    exchange = _Exchange()
    handlers: list[Any] = [_NoRedirects(), _Http(exchange), _Https(exchange, context)]
    opener = urllib.request.build_opener(*handlers, *([urllib.request.ProxyHandler({})] if direct else []))
    outcomes: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            with opener.open(request, timeout=seconds) as response:
                outcomes.put(response.read(LARGEST_ANSWER + 1))
        except BaseException as error:
            outcomes.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        outcome = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    finally:
        exchange.end()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


class _Exchange:
    """The sockets of one request, which `end` shuts whatever its thread is doing with them."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), False
        self._sockets: list[socket.socket] = []

    def watched(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        """`connection`, whose socket becomes known here as soon as it is connected."""
        connect = connection.connect

        def connect_and_tell() -> None:
            connect()
            with self._lock:
                self._sockets.append(connection.sock)
                if self._ended:
                    raise TimeoutError

        connection.connect = connect_and_tell  # type: ignore[method-assign]
        return connection

    def end(self) -> None:
        """Shuts the sockets; one that connects later is given up."""
        with self._lock:
            self._ended = True
            for own in self._sockets:
                with contextlib.suppress(OSError):
                    own.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def http_open(self, req: urllib.request.Request) -> Any:
        """Opens a connection that can be shut."""
        make: Any = lambda host, **options: self._exchange.watched(http.client.HTTPConnection(host, **options))  # noqa: E731
        return self.do_open(make, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, exchange: _Exchange, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._exchange, self._own_context = exchange, context

    def https_open(self, req: urllib.request.Request) -> Any:
        """Opens a connection that can be shut."""
        make: Any = lambda host, **options: self._exchange.watched(http.client.HTTPSConnection(host, **options))  # noqa: E731
        return self.do_open(make, req, context=self._own_context)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: neither the key nor the texts may reach another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follows nothing."""
        return None
