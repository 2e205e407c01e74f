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

LARGEST_ANSWER = 1 << 20  # largest body of a response in bytes


def post(
    url: str, body: bytes, headers: Mapping[str, str], seconds: float | int, *, context: ssl.SSLContext, direct: bool
) -> bytes:
    """Sends one POST request and returns the body of the response; redirects are not followed.

    A body of more than `LARGEST_ANSWER` bytes is cut one byte after that limit. The request runs in its own thread, and
    its sockets are shut down after `seconds`. Neither a host name that does not resolve nor a server that sends single
    bytes slowly can therefore block the caller.

    Args:
      url: http or https URL.
      body, headers: body and headers of the request.
      seconds: time for connection, request and response together.
      context: checks the server's certificate.
      direct: whether to ignore the proxies in the environment variables.

    Raises:
      TimeoutError: the response was not complete in time.
      urllib.error.HTTPError: the status is not 2xx; the body is not read.
      OSError, http.client.HTTPException: there is no connection, or the response is not HTTP.
    """
    request = urllib.request.Request(url, body, dict(headers), method="POST")
    sockets = _RequestSockets()
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects(), _Http(sockets), _Https(sockets, context)]
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
        sockets.shut_down()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


class _RequestSockets:
    """Holds the sockets of one request, so that another thread can shut them down."""

    def __init__(self) -> None:
        self._lock, self._is_shut_down = threading.Lock(), False
        self._sockets: list[socket.socket] = []

    def register(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        """Returns `connection`, which registers its socket here as soon as it is connected."""
        connect = connection.connect

        def connect_and_register() -> None:
            connect()
            with self._lock:
                self._sockets.append(connection.sock)
                if self._is_shut_down:
                    raise TimeoutError

        connection.connect = connect_and_register  # type: ignore[method-assign]
        return connection

    def shut_down(self) -> None:
        """Shuts down the sockets; an attempt to connect after that raises a TimeoutError."""
        with self._lock:
            self._is_shut_down = True
            for open_socket in self._sockets:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, sockets: _RequestSockets) -> None:
        super().__init__()
        self._sockets = sockets

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Sends the request over a connection that `_RequestSockets` can shut down."""
        make: Any = lambda host, **options: self._sockets.register(http.client.HTTPConnection(host, **options))  # noqa: E731
        return self.do_open(make, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, sockets: _RequestSockets, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._sockets, self._ssl_context = sockets, context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Sends the request over a connection that `_RequestSockets` can shut down."""
        make: Any = lambda host, **options: self._sockets.register(http.client.HTTPSConnection(host, **options))  # noqa: E731
        return self.do_open(make, req, context=self._ssl_context)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an error, so that neither the key nor the texts reach another host."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        """Returns None, which means that no redirect is followed."""
        return None
