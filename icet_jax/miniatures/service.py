"""Serves an OpenAI-compatible chat endpoint on this machine, whose verdicts depend on the length of the request."""

import http.server
import json
import threading
from collections.abc import Mapping
from typing import Any

from icet_jax.errors import UserError
from icet_jax.scorers.chat import Chat, load_chat

ENDPOINT = "toy:chat"


def chat(definition: Mapping[str, Any]) -> Chat:
    """Returns the judge that a config's `definition` describes, after starting a server for it in this process.

    Raises:
      UserError: the endpoint in `definition` is not `ENDPOINT`, or the definition is invalid.
    """
    if definition["endpoint"] != ENDPOINT:
        raise UserError(f"endpoint {definition['endpoint']!r}: no such toy; there is {ENDPOINT}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fields = {name: value for name, value in definition.items() if name != "kind"}
    fields |= {"endpoint": f"http://127.0.0.1:{server.server_port}/v1", "requests_per_second": 10_000}
    judge = load_chat(**fields)
    judge.fingerprint = json.dumps(dict(definition), sort_keys=True)  # the port differs between processes
    return judge


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers chat requests."""

    def do_POST(self) -> None:
        """Answers one request with a verdict."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        word = ("safe", "unsafe")[len(request["messages"][0]["content"]) % 2]
        message = {"role": "assistant", "content": word}
        body = json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Logs nothing."""
