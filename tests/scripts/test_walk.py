"""The commands of README and docs that CI runs: all of them, with miniatures for what must be downloaded."""

import re
import subprocess
import sys

from scripts import walk


def test_every_command_of_the_readme_is_run_or_left_out_for_a_reason():
    found = list(walk.commands())
    text = (walk.ROOT / "README.md").read_text(encoding="utf-8")
    ours = re.findall(r"^icet-jax ", text, re.MULTILINE)
    assert len(ours) == sum(command.page == "README.md" for command in found) > 8
    assert {command.reason for command in found} <= {"", *(why for _, why, _ in walk.LEFT_OUT)}
    assert not [command for command in found if command.page == "README.md" and command.reason]
    assert len({command.words for command in found}) == len(found)


def test_published_models_are_miniatures_and_all_else_is_as_written():
    found = [str(command) for command in walk.commands()]
    run = [text for text in found if "icet-jax plan" not in text]
    assert not [text for text in run if re.search(r"configs/(llava15|llama32v|llava_next)_\w+\.py(?!:smoke)", text)]
    assert any(text.endswith("export --workdir=runs/llava15 --out=release") for text in found)
    assert any("launch/local_processes.py --processes 2" in text for text in found)


def test_a_command_that_fails_fails_the_walk(tmp_path, capsys):
    good, bad = ((sys.executable, "-c", f"import sys; sys.exit({code})") for code in (0, 3))
    owners = {}
    assert walk.run(walk.Command("page.md", 1, good), tmp_path, owners) == 0
    assert walk.run(walk.Command("page.md", 2, bad), tmp_path, owners) == 3
    assert "3: page.md:2" in capsys.readouterr().out


MEET = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:3])
own.touch()
until = time.monotonic() + 60
while not other.exists():
    if time.monotonic() > until:
        sys.exit(1)
    time.sleep(0.01)
pathlib.Path("runs").mkdir(exist_ok=True)
pathlib.Path(f"runs/{own.name}").touch()
"""


def test_commands_that_name_one_place_run_in_order_and_others_side_by_side(tmp_path):
    """Two commands wait for each other; the one between them on the page reads what the first writes."""
    exists = "import pathlib, sys; sys.exit(not pathlib.Path('runs/first').exists())"
    words = [("-c", MEET, "first", "second", "--out=runs/first"), ("-c", exists, "--checkpoint=runs/first/hf")]
    words.append(("-c", MEET, "second", "first", "--out=runs/second"))
    commands = [walk.Command("page.md", line, (sys.executable, *each)) for line, each in enumerate(words)]
    assert walk.run_all(commands, tmp_path, at_once=2) == [0, 0, 0]


def test_a_run_directory_is_one_command_s(tmp_path):
    script = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1].split('=')[1]); p.mkdir(parents=True); (p / 'x').touch()"
    )
    first, second = ((sys.executable, "-c", script, "--workdir=runs/a", word) for word in ("one", "two"))
    owners = {}
    assert walk.run(walk.Command("a.md", 1, first), tmp_path, owners) == 0
    assert walk.run(walk.Command("a.md", 2, second), tmp_path, owners) == 0  # else mkdir finds the folder there
    assert (tmp_path / "runs" / "a" / "x").is_file()


def test_the_furnished_folder_has_what_pages_name(tmp_path):
    demo, folder = tmp_path / "demo", tmp_path / "folder"
    demo.mkdir()
    (demo / "report.html").write_text("x")
    folder.mkdir()
    walk.furnish(folder, demo)
    for name in ("DIR/config.json", "RUN/report.html", "runs/a/report.html", "cat.png", "prompts.csv", "DATA"):
        assert (folder / name).exists(), name
    listed = subprocess.run(
        [sys.executable, "scripts/walk.py", "--list"], cwd=walk.ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0 and "0 commands ran" in listed.stdout, listed.stderr


def test_a_command_that_reads_a_run_leaves_it_in_place(tmp_path):
    """In either form of a mode."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    owners = {"--workdir=run": ("another", "command")}
    for words in (("labels", "--workdir=run"), ("--mode=labels", "--workdir=run")):
        walk.run(walk.Command("page.md", 1, (sys.executable, "-m", "icet_jax.main", *words)), tmp_path, owners)
        assert (tmp_path / "run" / "config.json").exists()
