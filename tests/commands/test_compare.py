"""`--mode=compare` as a user types it."""

import pytest

from icet_jax import main as front_door
from tests.report.synthetic_compare import write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("icet_jax.report.figures.write_comparison_figures", lambda comparison, folder: [])
    return [str(write_run(tmp_path / name, exits=exits, default=exits)) for name, exits in (("a", 8), ("b", 12))]


@pytest.mark.parametrize("last", [False, True])
def test_runs_stand_before_or_after_the_flags(last, runs, tmp_path, capsys):
    flags = ["--mode=compare", "--out", str(tmp_path / "out")]
    assert front_door.main([*flags, *runs] if last else [flags[0], *runs, *flags[1:]]) == 0
    page = tmp_path / "out" / "compare.html"
    assert str(page) in capsys.readouterr().err
    assert 'class="series run-1"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode=compare", "RUN", "RUN2"], "needs --out"),
        (["--mode=compare", "RUN", "--out=there"], "needs two or more run directories"),
        (["--mode=sweep", "RUN", "--config=configs/organism_lppo.py"], "a run directory is for --mode=compare only"),
        (["--mode=compare", "RUN", "RUN2", "--out=file/below"], "cannot be written to"),
    ],
)
def test_wrong_usage_is_one_line(arguments, says, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert front_door.main([{"RUN": runs[0], "RUN2": runs[1]}.get(word, word) for word in arguments]) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1
