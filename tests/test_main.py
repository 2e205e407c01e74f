"""The front door as a user meets it: a process, its exit code and the one line it prints."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icet_jax import main as front_door
from icet_jax.runs import run_dir
from icet_jax.runs.config_files import load
from icet_jax.runs.sources import read_rows

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "--config=configs/organism_lppo.py"


def run(*arguments: str | bytes, **kwargs):
    command = [sys.executable, "-m", "icet_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no --config (nor --checkpoint); type: python -m icet_jax.main --config="),
        ([CONFIG], "needs --workdir"),
        ([CONFIG, "--mode=swep", "--workdir=x"], "no such mode (did you mean --mode=sweep?); there are align, sweep,"),
        ([CONFIG, "--mode=tidy", "--workdir=x"], "--mode=tidy: no such mode; there are align, sweep,"),
        ([CONFIG, "--workdr=x"], "--workdr=x: no such flag (did you mean --workdir?); type: python -m icet_jax.main"),
        ([CONFIG, "--lppo.kl_coef=1"], "no such flag (did you mean --config.lppo.kl_coef=1?)"),
        (["ask", "--checkpoint=organism:vlm"], "'ask' stands alone (did you mean --mode=ask?)"),
        (["--checkpoint=organism:vlm", "--prompt=hello"], "type: python -m icet_jax.main --mode=ask --checkpoint="),
        ([CONFIG, "--workdir=x", "--topology=v5e:4x4"], "--topology is for --mode=plan only"),
        (["--mode=ask", "--checkpoint=organism:vlm", "--largest-batch"], "--largest-batch is for --mode=plan only"),
        (["--mode=ask", "--checkpoint=organism:vlm", "--rows=3"], "--rows is for --mode=labels only"),
        (["--mode=ask"], "type: python -m icet_jax.main --mode=ask --checkpoint=organism:vlm --image="),
        (["--mode=reward", "--config=configs/rm_gpt2.py"], "type: python -m icet_jax.main --mode=reward --config="),
        ([CONFIG, "--mode"], "expected one argument; type: "),
        (["--config", "configs/nothing.py", "--workdir=x"], "configs/nothing.py: no such file"),
        ([CONFIG, "--workdir=x", "--config.lppo.kl_coeff=1"], "the nearest is config.lppo.kl_coef"),
        ([CONFIG, "--workdir=x", "--config.lppo.kl_coef"], "has no value"),
        ([CONFIG, "--workdir=x", "--config.lppo.kl_coef", "-1"], "must be 0 or more"),
        (["--checkpoint=somewhere", "--workdir=x"], "--mode=align needs --config"),
        (["--mode=export"], "--mode=export needs --workdir"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert front_door.main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1 and printed.startswith("icet-jax: ")
    assert list(tmp_path.iterdir()) == []


UNREADABLE = os.fsdecode(b"what is this \xff?")  # as it arrives in sys.argv


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--mode=ask", "--checkpoint=organism:vlm", f"--prompt={UNREADABLE}"], "--prompt"),
        (["--mode=ask", "--prompt", UNREADABLE, "--checkpoint=organism:vlm"], "--prompt"),
        ([CONFIG, "--workdir=x", f"--config.data.train={UNREADABLE}"], "--config.data.train"),
        ([CONFIG, "--workdir=x", f"--{UNREADABLE}"], r"'--what is this \udcff?'"),
        ([UNREADABLE], r"'what is this \udcff?'"),
    ],
)
def test_bytes_that_are_no_text_are_one_line(arguments, names, capsys):
    assert front_door.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"icet-jax: {names}: holds bytes that are not text in this terminal's encoding, ")
    assert printed.count("\n") == 1 and "LC_ALL=C.UTF-8" in printed


ASCII = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_letter_that_the_locale_does_not_have_is_one_line():
    result = run("--mode=ask", "--checkpoint=organism:vlm", "--prompt=\u00e9".encode(), env=ASCII)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "icet-jax: --prompt: holds bytes that are not text in this terminal's encoding, ascii;"
    )


def test_an_answer_that_the_terminal_cannot_show_is_printed_with_escapes():
    code = "from icet_jax import main; main.main = lambda: print('caf\\u00e9 \\u6f22 \\udcff') or 0; main.console()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ASCII)
    assert (result.returncode, result.stdout) == (0, "caf\\xe9 \\u6f22 \\udcff\n"), result.stderr


def test_a_wrong_flag_is_answered_before_jax_is_imported():
    code = (
        "import sys; from icet_jax.main import main; assert main(['--config=configs/organism_lppo.py',"
        "'--workdir=x', '--config.lppo.kl_coef=-1']) == 2; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_names_the_modes_and_the_command(capsys):
    with pytest.raises(SystemExit) as caught:
        front_door.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert front_door.EXAMPLE in printed and front_door.EXAMPLES.keys() == front_door.MODES.keys()
    for mode, what in front_door.MODES.items():
        line, example = (line.strip() for line in printed.partition(f"  {mode:8} ")[2].splitlines()[:2])
        assert (line, example) == (what, f"icet-jax {front_door.EXAMPLES[mode]}")


@pytest.mark.parametrize("mode", front_door.MODES)
def test_every_example_of_help_starts_its_mode(mode, monkeypatch):
    """As typed, in the repository: its flags parse, its config loads, its files are there, and its mode is started."""
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"icet_jax.commands.{mode}")
    monkeypatch.setattr("icet_jax.parallel.compilations.keep_programs", lambda where: None)
    calls = []
    monkeypatch.setattr(module, "run", lambda *given: calls.append(given) or 0)
    assert front_door.main(shlex.split(front_door.EXAMPLES[mode])) == 0
    [(config, workdir, options)] = calls
    assert options.mode == mode and (workdir is None or workdir.parts[0] == "runs")
    named = [*options.image, *(path for path in config.sweep.datasets.values() if path.startswith("examples"))]
    assert all((ROOT / path).is_file() for path in named)


def test_the_example_image_is_one_of_the_organisms_world():
    from icet_jax.organism import world

    shown = np.asarray(Image.open(ROOT / "examples" / "scene.png"))
    np.testing.assert_array_equal(shown, world.rows("test", "vqa", np.arange(5, 6)).images[0])


def test_the_example_rows_are_all_usable():
    records = read_rows(str(ROOT / "examples" / "prompts.csv"))
    assert [row.kind for row in records.examples] == ["forbidden"] * 4 + ["benign"] * 2 and not records.problems


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(front_door, "run", interrupted)
    assert front_door.main([]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(CONFIG, f"--workdir={tmp_path / 'file' / 'run'}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "cannot be written to" in result.stderr and "Traceback" not in result.stderr


def test_a_run_that_never_began_gives_its_folder_up(tmp_path):
    run_dir.claim(tmp_path, load("configs/organism_lppo.py"))
    run_dir.claim(tmp_path, load("configs/organism_lsft.py"))
    assert run_dir.read_config(tmp_path / "config.json").algorithm == "lsft"


def test_a_workdir_of_another_config_is_refused(tmp_path, capsys):
    run_dir.claim(tmp_path, load("configs/organism_lppo.py"))
    (tmp_path / "metrics.jsonl").touch()
    before = (tmp_path / "config.json").read_bytes()
    run_dir.claim(tmp_path, load("configs/organism_lppo.py"))
    arguments = [CONFIG, f"--workdir={tmp_path}", "--config.lppo.kl_coef=0.5", "--config.sweep.utility.more=a.csv"]
    assert front_door.main(arguments) == 2
    printed = capsys.readouterr().err
    assert "lppo.kl_coef (0.05 there, 0.5 now)" in printed and "sweep.utility" in printed
    assert (tmp_path / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_broken_config_json_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert front_door.main([CONFIG, f"--workdir={tmp_path}"]) == 2
    assert "not a run's config" in capsys.readouterr().err


def test_config_json_holds_every_field(tmp_path):
    config = load("configs/organism_lppo.py", [("seeds", "1,2"), ("sweep.exits", "1,2")])
    run_dir.claim(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["seeds"] == [1, 2] and stored["lppo"]["fixed_exit"] is None
    assert set(stored) == set(config)


def test_the_repository_has_the_files_its_commands_name():
    makefile = (ROOT / "Makefile").read_text()
    assert front_door.EXAMPLE.removeprefix("python ") in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make demo" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("mode", "finished", "shown"), [("sweep", True, "worst\n"), ("sweep", False, ""), ("plan", True, "")]
)
def test_a_finished_measurement_ends_with_its_headline(mode, finished, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"icet_jax.commands.{mode}.run", lambda *given: 0)
    monkeypatch.setattr("icet_jax.parallel.compilations.keep_programs", lambda where: None)
    monkeypatch.setattr("icet_jax.report.headline", lambda folder: "worst" if folder == tmp_path else "")
    if finished:
        (tmp_path / "report.html").touch()
    assert front_door.main([f"--mode={mode}", CONFIG, f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == shown
