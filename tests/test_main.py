"""The front door as a user meets it: a process, its exit code and the one line it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from icet_jax import main as front_door
from icet_jax.runs import run_dir
from icet_jax.runs.config_files import load

CONFIG = "--config=configs/organism_lppo.py"


def run(*arguments: str, **kwargs):
    command = [sys.executable, "-m", "icet_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no --config (nor --checkpoint); type: python -m icet_jax.main --config="),
        ([CONFIG], "needs --workdir"),
        ([CONFIG, "--mode=swep", "--workdir=x"], "invalid choice: 'swep'"),
        ([CONFIG, "--workdr=x"], "unrecognized arguments: --workdr=x"),
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
    assert all(mode in printed for mode in front_door.MODES) and front_door.EXAMPLE in printed


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
    root = Path(front_door.__file__).parent.parent
    makefile = (root / "Makefile").read_text()
    assert front_door.EXAMPLE.removeprefix("python ") in makefile
    assert "make test" in (root / ".ci" / "run").read_text() and "make demo" in (root / ".ci" / "run").read_text()
