"""The audit fails for a vulnerability that nobody accepted, and never passes silently where nothing was asked."""

import contextlib
import importlib.util
import json
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("pip_audit")

ROOT = Path(__file__).parents[2]
ADVISORY = {
    "id": "GHSA-aaaa-bbbb-cccc",
    "aliases": ["CVE-2099-1"],
    "summary": "placeholder",
    "affected": [
        {
            "package": {"name": "markupsafe", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
        }
    ],
}


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ACCEPTED", tmp_path / "advisories.txt")
    monkeypatch.setattr(module, "direct_requirements", lambda: [Requirement("jinja2>=3")])  # it needs markupsafe
    (tmp_path / "advisories.txt").write_text("# none\n")
    return module


@contextlib.contextmanager
def service(answers):
    """A service of advisories in the OSV form, None: one that answers nonsense; yields pip-audit's arguments for it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            known = None if answers is None else answers.get(asked)
            body = b"<html>" if answers is None else json.dumps({"vulns": known} if known else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield ["--vulnerability-service", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query"]
    finally:
        server.shutdown()
        server.server_close()


def test_a_vulnerability_fails_until_it_is_accepted_with_a_reason(script, capsys):
    with service({"markupsafe": [ADVISORY]}) as arguments:
        assert script.main(arguments) == 1
        said = capsys.readouterr().out
        assert (
            f"VULNERABLE: markupsafe {metadata.version('markupsafe')}: CVE-2099-1 = GHSA-aaaa-bbbb-cccc, fixed in 99.1"
            in said
        )
        assert "2 packages asked about, 1 vulnerabilities" in said and "NOT AUDITED" not in said

        script.ACCEPTED.write_text("CVE-2099-1 only placeholders are escaped\nCVE-2099-2 gone by now\n")
        assert script.main(arguments) == 0
        said = capsys.readouterr().out
        assert "accepted: markupsafe" in said and "only placeholders are escaped" in said
        assert "names CVE-2099-2, which nothing has any more" in said and "VULNERABLE" not in said

        script.ACCEPTED.write_text("CVE-2099-1\n")
        with pytest.raises(SystemExit, match="has no reason"):
            script.main(arguments)


def test_what_was_not_asked_is_said(script, capsys):
    with service({}) as arguments:
        assert script.main(arguments) == 0
        assert "NOT AUDITED" not in capsys.readouterr().out
    with service(None) as broken:
        assert script.main(broken) == 0
        assert "NOT AUDITED: 2 of 2 packages (jinja2, markupsafe" in capsys.readouterr().out
    assert script.main(arguments) == 0  # nobody listens there now
    assert "NOT AUDITED: 2 of 2 packages (jinja2, markupsafe" in capsys.readouterr().out


def test_extras_and_what_they_need_are_asked_about(script):
    versions = script.installed_versions([Requirement("icet-jax-none"), Requirement("pytest-xdist>=3")])
    assert {"pytest-xdist", "pytest", "execnet", "pluggy"} <= versions.keys() and "psutil" not in versions
    assert all("+" not in version for version in versions.values())


def test_every_dependency_has_a_lower_bound_and_comes_from_the_index():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, lines):
        assert requirement.url is None, requirement
        assert any(part.operator == ">=" for part in requirement.specifier), requirement


def test_the_file_of_accepted_advisories_can_be_read():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(module.accepted_advisories(module.ACCEPTED.read_text()).values())
