"""The command line as a user meets it: a process, its exit code and the one line it prints."""

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

import icet_jax
from icet_jax import main as command_line
from icet_jax.config import FIELDS
from icet_jax.runs import run_dir, shipped
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
        (["align"], "no --config (nor --checkpoint); type: python -m icet_jax.main align --config="),
        ([CONFIG], "needs --workdir"),
        ([CONFIG, "--mode=swep", "--workdir=x"], "no such mode (did you mean --mode=sweep?); there are align, sweep,"),
        ([CONFIG, "--mode=tidy", "--workdir=x"], "--mode=tidy: no such mode; there are align, sweep,"),
        ([CONFIG, "--workdr=x"], "--workdr=x: no such flag (did you mean --workdir?); type: python -m icet_jax.main"),
        ([CONFIG, "--lppo.kl_coef=1"], "no such flag (did you mean --config.lppo.kl_coef=1?)"),
        (["--checkpoint=organism:vlm", "ask"], "'ask' stands alone (did you mean ask?): a mode is the first word"),
        (["swep", CONFIG], "'swep' stands alone (did you mean sweep?): a mode is the first word"),
        (["sweep", CONFIG, "--mode=plan"], "sweep and --mode=plan: the mode is given twice"),
        (["sweep", CONFIG, "--mode", "sweep"], "sweep and --mode: the mode is given twice"),
        (["sweep", CONFIG], "--mode=sweep needs --workdir"),
        (["--fields=lpo"], "--fields=lpo: no such section (did you mean lppo?); there are algorithm,"),
        (["--checkpoint=organism:vlm", "--prompt=hello"], "type: python -m icet_jax.main ask --checkpoint="),
        ([CONFIG, "--workdir=x", "--topology=v5e:4x4"], "--topology is for --mode=plan only"),
        (["--mode=ask", "--checkpoint=organism:vlm", "--largest-batch"], "--largest-batch is for --mode=plan only"),
        (["--mode=ask", "--checkpoint=organism:vlm", "--rows=3"], "--rows is for --mode=labels only"),
        (["--mode=ask"], "type: python -m icet_jax.main ask --checkpoint=organism:vlm --image="),
        (["--mode=reward", "--config=configs/rm_gpt2.py"], "type: python -m icet_jax.main reward --config="),
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
    assert command_line.main(arguments) == 2
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
    assert command_line.main(arguments) == 2
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


def test_no_arguments_print_the_usage():
    result = run()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: icet-jax [MODE] [--config=FILE]")
    for name, mode in command_line.MODES.items():
        assert f"  {name:8} {mode.about}\n" in result.stderr


def test_version_is_the_packages():
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"icet-jax {icet_jax.__version__}\n", "")


def help_of(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_names_the_modes_and_the_command(capsys):
    printed = help_of(["--help"], capsys)
    assert command_line.COMMAND in printed
    for name, mode in command_line.MODES.items():
        line, example = (line.strip() for line in printed.partition(f"  {name:8} ")[2].splitlines()[:2])
        assert (line, example) == (mode.about, f"icet-jax {mode.example}") and mode.example.startswith(f"{name} ")


@pytest.mark.parametrize("form", [["plan", "--help"], ["--mode=plan", "--help"]])
def test_help_of_a_mode_shows_its_flags_alone(form, capsys):
    printed = help_of(form, capsys)
    assert f"icet-jax {command_line.MODES['plan'].example}" in printed and "--topology" in printed
    assert "--config" in printed and not any(flag in printed for flag in ("--image", "--verdicts", "--coordinator"))


def test_the_fields_of_a_config_are_listed(capsys):
    assert command_line.main(["--fields"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition("=")[0] for line in printed[::2]] == [f"--config.{name}" for name in FIELDS]
    assert printed[1::2] == [f"    {field.about}" for field in FIELDS.values()]
    assert command_line.main(["--fields", "lppo.kl_coef"]) == 0
    assert capsys.readouterr().out == (
        "--config.lppo.kl_coef=0.2 per nat    (0 or more; TRL)\n"
        "    Coefficient of the KL term in the reward at the start of the run.\n"
    )


def started(arguments, monkeypatch):
    """What the mode's `run` is called with: the config, the run directory and the flags."""
    calls = []
    monkeypatch.setattr("icet_jax.parallel.compilations.keep_programs", lambda where: None)
    for mode in command_line.MODES:
        module = importlib.import_module(f"icet_jax.commands.{mode}")
        monkeypatch.setattr(module, "run", lambda *given, mode=mode: calls.append((mode, *given)) or 0)
    assert command_line.main(arguments) == 0
    [(mode, config, workdir, options)] = calls
    assert options.mode == mode
    return config, workdir, options


@pytest.mark.parametrize("mode", command_line.MODES)
def test_every_example_of_help_starts_its_mode_in_both_forms(mode, monkeypatch):
    """As typed, in the repository: its flags parse, its config loads, its files are there, and its mode is started."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command_line.MODES[mode].example)
    config, workdir, options = started(words, monkeypatch)
    assert options.mode == mode and (workdir is None or workdir.parts[0] == "runs")
    named = [*options.image, *(path for path in config.sweep.datasets.values() if path.startswith("examples"))]
    assert all((ROOT / path).is_file() for path in named)
    for flag in ([f"--mode={mode}", *words[1:]], [*words[1:], "--mode", mode]):
        assert started(flag, monkeypatch) == (config, workdir, options)


def test_the_example_image_is_one_of_the_organisms_world():
    from icet_jax.organism import world

    shown = np.asarray(Image.open(ROOT / "examples" / "scene.png"))
    np.testing.assert_array_equal(shown, world.rows("test", "vqa", np.arange(5, 6)).images[0])


def test_an_example_is_found_where_it_does_not_lie_and_ones_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shipped.example("examples/scene.png")).read_bytes() == (ROOT / "examples" / "scene.png").read_bytes()
    assert len(read_rows("examples/prompts.csv").examples) == 6
    for path in ("README.md", "examples/none.png", str(tmp_path / "examples" / "scene.png")):
        assert shipped.example(path) == path
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "scene.png").write_bytes(b"mine")
    assert Path(shipped.example(Path("examples/scene.png"))).read_bytes() == b"mine"


def test_the_example_rows_are_all_usable():
    records = read_rows(str(ROOT / "examples" / "prompts.csv"))
    assert [row.kind for row in records.examples] == ["forbidden"] * 4 + ["benign"] * 2 and not records.problems


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "run", interrupted)
    assert command_line.main([]) == 130
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
    assert command_line.main(arguments) == 2
    printed = capsys.readouterr().err
    assert "lppo.kl_coef (0.05 there, 0.5 now)" in printed and "sweep.utility" in printed
    assert (tmp_path / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_broken_config_json_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert command_line.main([CONFIG, f"--workdir={tmp_path}"]) == 2
    assert "not a run's config" in capsys.readouterr().err


def test_config_json_holds_every_field(tmp_path):
    config = load("configs/organism_lppo.py", [("seeds", "1,2"), ("sweep.exits", "1,2")])
    run_dir.claim(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["seeds"] == [1, 2] and stored["lppo"]["fixed_exit"] is None
    assert set(stored) == set(config)


def test_the_repository_has_the_files_its_commands_name():
    makefile = (ROOT / "Makefile").read_text()
    assert command_line.EXAMPLE.removeprefix("python ") in makefile
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
    assert command_line.main([f"--mode={mode}", CONFIG, f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == shown
