"""A stand-in for the Perspective API on this machine: a number made of the text's length."""

import datetime
import http.server
import json
import os
import threading
from collections.abc import Sequence
from unittest import mock

from icet_jax.judges.perspective import KEY, Perspective


def perspective(attributes: Sequence[str]) -> Perspective:
    """The API's client, talking to a service in this process (which lives as long as it) with a key of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with mock.patch.dict(os.environ, {KEY: "toy"}):
        return Perspective(
            attributes,
            requests_per_second=10_000,
            endpoint=f"http://127.0.0.1:{server.server_port}/",
            today=lambda: datetime.date(2026, 1, 1),  # this service does not end
        )


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Answers a request for the scores of one comment."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        value = len(asked["comment"]["text"]) % 10 / 10
        scores = {name: {"summaryScore": {"value": value}} for name in asked["requestedAttributes"]}
        body = json.dumps({"attributeScores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""
