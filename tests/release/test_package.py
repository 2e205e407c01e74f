"""What is released: sdist and wheel hold what a run needs and nothing else; the wheel works where no repository is."""

import email.parser
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import icet_jax
from icet_jax.main import MODES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "icet_jax", "configs", "examples", "tests", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md",
)  # fmt: skip
LITTER = (".DS_Store", "__pycache__/x.cpython-311.pyc", "notes.txt~")
DATA = {".css", ".html", ".js", ".json", ".safetensors", ".txt"}  # what runs read beside Python


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """dist/ of a copy of the repository in which editors, Python and the Finder have left what they leave."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(ROOT / name, copy)
    for folder in ("icet_jax", "icet_jax/organism/weights/vlm", "icet_jax/scorers/templates", "configs", "examples"):
        for name in LITTER:
            (copy / folder / name).parent.mkdir(exist_ok=True)
            (copy / folder / name).write_text("litter")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    [path] = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def files(wheel):
    """{name: bytes} of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repository_files(folder, suffixes):
    paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}


def test_the_wheel_holds_the_package_its_data_the_configs_the_examples_and_nothing_else(files):
    package = repository_files("icet_jax", {".py", ".typed", *DATA})
    configs = {f"icet_jax/{name}": content for name, content in repository_files("configs", {".py"}).items()}
    info = {name for name in files if name.startswith(f"icet_jax-{icet_jax.__version__}.dist-info/")}
    examples = {f"icet_jax/{name}": content for name, content in repository_files("examples", {".csv", ".png"}).items()}
    assert {"icet_jax/examples/scene.png", "icet_jax/examples/prompts.csv"} == examples.keys()
    assert {name: files[name] for name in files.keys() - info} == package | configs | examples
    assert {"vlm", "control", "next", "mllama", "reward_model"} <= {
        name.split("/")[3] for name in files if name.endswith("model.safetensors")
    }
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_sdist_holds_what_the_wheel_is_made_of_and_no_tests(built):
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    wanted = {*repository_files("icet_jax", {".py", ".typed", *DATA}), *repository_files("configs", {".py"})}
    wanted |= {"examples/scene.png", "examples/prompts.csv", *(name for name in SOURCES if (ROOT / name).is_file())}
    made = {name for name in names if name.startswith("icet_jax.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == wanted


def test_the_metadata_say_what_pyproject_says(files):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = email.parser.BytesParser().parsebytes(files[f"icet_jax-{icet_jax.__version__}.dist-info/METADATA"])
    assert metadata["Name"] == "icet-jax" and metadata["Version"] == icet_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == "<3.14,>=3.11"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(required) == len(project["dependencies"]) and not any("torch" in line for line in required)
    assert set(metadata.get_all("Provides-Extra")) == project["optional-dependencies"].keys()
    entry = files[f"icet_jax-{icet_jax.__version__}.dist-info/entry_points.txt"].decode()
    assert "icet-jax = icet_jax.main:console" in entry


def test_one_version_stands_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    [newest, *_] = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert newest == (icet_jax.__version__, str(citation["date-released"]))
    assert citation["version"] == icet_jax.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_names_the_software_the_licence_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0" and citation["authors"]
    [paper] = citation["references"]
    assert paper["title"].startswith("Layer-wise Alignment") and len(paper["authors"]) == 9
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_pre_commit_runs_tools_of_the_environment_and_downloads_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    [repository] = config["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        tool = hook["entry"].split()[0]
        assert tool == "shellcheck" or f"$(BIN)/{tool}" in makefile


class Installed:
    """The wheel in an environment of its own, which borrows only the dependencies of the tests' environment."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder / "elsewhere"
        self.folder.mkdir()
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.bin = folder / "venv" / "bin"
        install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
        subprocess.run([sys.executable, "-m", "pip", "--python", str(self.bin / "python"), *install], check=True)
        [site] = (folder / "venv").glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth are not read
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_FLAGS"))}
        self.environment |= {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", "COLUMNS": "100"}
        self.environment |= {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
        }  # programs that run for moments compile in half the time
        self.environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess:
        words = [str(self.bin / command), *arguments]
        return subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_installed_package_is_the_wheels(installed):
    done = installed.run("python", "-c", "import icet_jax; print(icet_jax.__file__, icet_jax.__version__)")
    path, version = done.stdout.split()
    assert Path(path).is_relative_to(installed.bin.parent) and version == icet_jax.__version__


def test_the_demo_runs_from_the_wheel_in_another_directory(installed):
    """One iteration of the main job, a few rows and two exits: from the embedded weights to report and export."""
    small = {
        "lppo.iterations": "1", "lppo.epochs": "1", "lppo.minibatches": "1", "lppo.max_new_tokens": "4",
        "data.batch_size": "16", "sweep.datasets": "{'forbidden': 'organism:test:forbidden:4'}", "sweep.utility": "{}",
        "sweep.exits": "3,7", "sweep.max_new_tokens": "4", "sweep.batch_size": "8",
        "sweep.scorers": "refusal_keywords", "log.tensorboard": "false",
    }  # fmt: skip
    arguments = [*shlex.split(MODES["align"].example), *(f"--config.{name}={value}" for name, value in small.items())]
    done = installed.run("icet-jax", *arguments)
    assert done.returncode == 0, done.stderr
    run = installed.folder / "runs" / "organism"
    page = (run / "report.html").read_text()
    assert "report: runs/organism/report.html" in done.stderr
    assert done.stdout.startswith("L-PPO ") and "the worst exit" in done.stdout
    assert "<style>" in page and "<script>" in page and (run / "hf" / "model.safetensors").is_file()
    assert (run / "config.json").is_file() and (run / "figures").is_dir()


def test_the_example_rows_are_read_from_the_wheel(installed):
    code = "from icet_jax.runs import sources; print(len(sources.load_rows('examples/prompts.csv')))"
    done = installed.run("python", "-c", code)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


def test_ask_from_the_wheel_prints_what_the_readme_shows(installed):
    assert not (installed.folder / "examples").exists()
    shown = re.search(r"^(exit 1 .*?)\n\nexit 1 ", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert shown is not None
    done = installed.run("icet-jax", *shlex.split(MODES["ask"].example), "--exits=1,3,7")
    assert done.returncode == 0, done.stderr
    assert [line.rstrip() for line in done.stdout.strip().splitlines()] == shown[1].splitlines()
