"""Sends a POST request with limits on its total time and the size of the response, for judges on other machines."""

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
    """Returns the body of the response to one request, at most one byte more than `LARGEST_ANSWER`, without redirects.

    The request runs in its own thread. After `seconds` its sockets are shut down, so that neither a name that does not
    resolve nor a server that sends single bytes slowly can block the caller.

    Args:
      url: http or https URL.
      body, headers: body and headers of the request.
      seconds: time for connection, request and whole response together.
      context: checks the server's certificate.
      direct: whether to ignore the proxies that the environment names.

    Raises:
      TimeoutError: the response was not complete in time.
      urllib.error.HTTPError: the status is not 2xx; the body is not read.
      OSError, http.client.HTTPException: there is no connection, or the response is not HTTP.
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
    """Holds the sockets of one request, which `end` shuts down whatever the request's thread is doing."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), False
        self._sockets: list[socket.socket] = []

    def register(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        """Returns `connection`, which registers its socket here as soon as it is connected."""
        connect = connection.connect

        def connect_and_register() -> None:
            connect()
            with self._lock:
                self._sockets.append(connection.sock)
                if self._ended:
                    raise TimeoutError

        connection.connect = connect_and_register  # type: ignore[method-assign]
        return connection

    def end(self) -> None:
        """Shuts down the sockets; one that connects later raises an error."""
        with self._lock:
            self._ended = True
            for open_socket in self._sockets:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def http_open(self, req: urllib.request.Request) -> Any:
        """Opens a connection that can be shut."""
        make: Any = lambda host, **options: self._exchange.register(http.client.HTTPConnection(host, **options))  # noqa: E731
        return self.do_open(make, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, exchange: _Exchange, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._exchange, self._own_context = exchange, context

    def https_open(self, req: urllib.request.Request) -> Any:
        """Opens a connection that can be shut."""
        make: Any = lambda host, **options: self._exchange.register(http.client.HTTPSConnection(host, **options))  # noqa: E731
        return self.do_open(make, req, context=self._own_context)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an error, so that neither the key nor the texts reach another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Returns None, which means that no redirect is followed."""
        return None
