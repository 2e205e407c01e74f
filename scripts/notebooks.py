"""Runs all cells of docs/notebooks/*.ipynb, each notebook in an empty folder; stops at the first cell that fails.

    python scripts/notebooks.py                 # all notebooks; --only=ask runs one
    python scripts/notebooks.py --write         # stores the outputs in the notebooks, as the repository has them

Needs the `test` extra. A notebook in `NEEDS` is left out unless its environment variable is set, and stays without
outputs.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/notebooks"
SOURCE_MARK = "outputs_of"
"""Field of a notebook's metadata with the digest of the code that produced its outputs."""
NEEDS = {"real_model": "ICET_REAL_BUILD"}
"""{notebook: environment variable that names the folder it needs}."""
_TIME_LIMIT = 600  # seconds for one cell


def names() -> list[str]:
    """Returns the names of the notebooks, without .ipynb."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def execute(name: str, afterwards: Sequence[str] = ()) -> Any:
    """Runs a notebook in an empty folder and returns it with its outputs.

    Args:
      name: name of the notebook.
      afterwards: code of further cells, which are run at the end and can use the notebook's variables.

    Raises:
      CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in afterwards]
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=_TIME_LIMIT,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # says at every start that it talks over local TCP
        )
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),  # this repository's icet_jax, whichever is installed
            "IPYTHONDIR": folder,  # no history and no settings of the user
        }
        client.execute(env=os.environ | environment)
    return notebook


def digest(notebook: Any) -> str:
    """Returns a hash of a notebook's code, which does not depend on its outputs."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def write(name: str, notebook: Any) -> None:
    """Writes an executed notebook to docs/notebooks, with the digest of its code."""
    import nbformat

    notebook.metadata[SOURCE_MARK] = digest(notebook)
    notebook.metadata.pop("language_info", None)  # the version of Python here
    nbformat.validate(notebook)
    (FOLDER / f"{name}.ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def main() -> int:
    """Runs the notebooks; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--only", choices=names(), help="one notebook")
    options = parser.parse_args()
    from nbclient.exceptions import CellExecutionError

    for name in [options.only] if options.only else names():
        if name in NEEDS and not os.environ.get(NEEDS[name]):
            print(f"{name}: left out, because {NEEDS[name]} is not set")
            continue
        began = time.monotonic()
        try:
            notebook = execute(name)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        if options.write and name not in NEEDS:
            write(name, notebook)
        print(f"{name}: {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
