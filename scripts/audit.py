"""Looks for known vulnerabilities in the dependencies of the package and its tests (`make audit`).

It asks the public advisories of PyPI, through pip-audit, about every installed package that `pyproject.toml` requires,
directly or indirectly. The exit code is 1 for a vulnerability that `.ci/advisories.txt` does not accept. If the
advisories cannot be reached, for example behind a firewall, the exit code is 0 and the last lines say that nothing was
audited. Arguments go to pip-audit; for a mirror: `python scripts/audit.py --vulnerability-service osv --osv-url URL`.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ACCEPTED = ROOT / ".ci" / "advisories.txt"


def direct_requirements() -> list[Requirement]:
    """Returns the requirements in `pyproject.toml` of the package and of its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]]


def installed_versions(requirements: list[Requirement]) -> dict[str, str]:
    """Returns {canonical name: installed version} of these requirements and of everything that they require in turn.

    Packages that are not installed are left out. A suffix such as "+cpu" is removed, because advisories do not use it.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(requirement.name, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while queue:
        required_name, extra = queue.pop()
        name = canonicalize_name(required_name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = package.version.partition("+")[0]
        for dependency in map(Requirement, package.requires or ()):
            if dependency.marker is None or dependency.marker.evaluate({"extra": extra}):
                queue += [(dependency.name, its_extra) for its_extra in ("", *dependency.extras)]
    return versions


def accepted_advisories(text: str) -> dict[str, str]:
    """Returns {advisory: reason} from the text of `.ci/advisories.txt`; lines that begin with `#` are comments.

    Raises:
      SystemExit: an advisory has no reason.
    """
    entries = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith("#"):
            name, _, reason = line.partition(" ")
            if not reason.strip():
                raise SystemExit(f"{ACCEPTED.name}: {name} has no reason; write one after it")
            entries[name] = reason.strip()
    return entries


def ask(versions: dict[str, str], arguments: list[str]) -> tuple[list[dict], str]:
    """Runs pip-audit and returns (its entry for each package, ""), or ([], error message) if it fails.

    Args:
      versions: {package: version}.
      arguments: further arguments of pip-audit.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(result.stdout)["dependencies"], ""
    except (ValueError, KeyError, TypeError):
        return [], (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


def main(arguments: list[str]) -> int:
    """Audits the installed dependencies, prints the vulnerabilities and returns the exit code."""
    accepted = accepted_advisories(ACCEPTED.read_text(encoding="utf-8"))
    versions = installed_versions(direct_requirements())
    answers, problem = ask(versions, arguments)
    audited = {canonicalize_name(answer["name"]): answer["vulns"] for answer in answers if "vulns" in answer}
    refused, seen = [], set()
    for name, advisories in sorted(audited.items()):
        for advisory in advisories:
            names = {advisory["id"], *advisory.get("aliases", ())}
            reasons = [accepted[known] for known in sorted(names & accepted.keys())]
            seen |= names
            fix = f"fixed in {', '.join(advisory['fix_versions'])}" if advisory["fix_versions"] else "no fix yet"
            line = f"{name} {versions.get(name, '')}: {' = '.join(sorted(names))}, {fix}"
            print(f"accepted: {line} ({reasons[0]})" if reasons else f"VULNERABLE: {line}")
            refused += [] if reasons else [line]
    missed = sorted(versions.keys() - audited.keys())
    if audited:
        print(f"audit: {len(audited)} packages asked about, {len(refused)} vulnerabilities that are not accepted")
        for unneeded in sorted(accepted.keys() - seen):
            print(f"audit: {ACCEPTED.name} names {unneeded}, which nothing has any more; remove the line")
    if missed:
        print("*" * 100)
        print(f"* NOT AUDITED: {len(missed)} of {len(versions)} packages ({', '.join(missed[:5])}, ...).")
        print(f"* The advisories could not be reached or do not know them. {problem[:200]}".rstrip())
        print("* Run `make audit` again where https://pypi.org/pypi/ answers.")
        print("*" * 100)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
