"""Named pipes and devices, which give no end: each is refused in one line, at every place that reads a user's file."""

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from icet_jax import main as front_door
from icet_jax.checkpoints.source import local_directory
from icet_jax.data.hh_rlhf import read_pairs
from icet_jax.data.prepared import read_facts
from icet_jax.errors import UserError
from icet_jax.evaluation.transcripts import finished_rows
from icet_jax.media.images import image_size, open_image
from icet_jax.report.loading import read_json
from icet_jax.runs import fingerprints, run_dir
from icet_jax.runs.config_files import load
from icet_jax.runs.sources import read_rows
from icet_jax.scorers.cache import _Table
from icet_jax.scorers.human import _rows
from icet_jax.training.metrics_log import truncate


@pytest.fixture(autouse=True)
def ends():
    """A reader that waits fails in place of holding the tests up."""

    def waited(*_):
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS = {
    "rows.csv": lambda path: read_rows(str(path)),
    "rows.jsonl": lambda path: read_rows(str(path)),
    "picture.png": open_image,
    "scene.png": image_size,
    "captions.json": lambda path: read_rows(f"captions:{path}?images={path.parent}"),
    "fingerprints.json": fingerprints._read,
    "pairs.jsonl": read_pairs,
    "pairs.jsonl.gz": read_pairs,
    "labels": _rows,
    "config.py": lambda path: load(str(path)),
    "config.json": run_dir.read_config,
    "cost.json": lambda path: run_dir.Costs(path.parent),
    "model.safetensors": lambda path: local_directory(path.parent),
    "tokenizer_config.json": lambda path: local_directory(path.parent),
    "adapter_config.json": lambda path: local_directory(path.parent),
    "source.json": lambda path: read_facts(path.parent.parent, path.parent.name),
    "before.x.jsonl": lambda path: finished_rows(path, []),
    "scores.jsonl": lambda path: _Table(path.parent, "judge"),
    "metrics.jsonl": lambda path: truncate(path, 1),
    "data.json": read_json,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_and_a_device_are_refused_where_a_file_is_read(name, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{name}: is a named pipe, not a regular file; write what it gives to a file"):
        READERS[name](path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}: is a device, not a regular file"):
        READERS[name](path)


def test_a_link_to_a_file_is_a_file(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "file.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "file.png")
    (tmp_path / "file.csv").write_text("prompt,image\nplaceholder,link.png\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "file.csv")
    [row] = read_rows(str(tmp_path / "link.csv")).examples
    assert open_image(Path(row.images[0])).size == (4, 4)


def test_the_command_ends_with_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.csv")
    flags = ["--checkpoint=organism:vlm", f"--config.sweep.datasets.mine={tmp_path / 'pipe.csv'}"]
    assert front_door.main(["--mode=prepare", *flags, f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr().err
    assert "pipe.csv: is a named pipe, not a regular file" in printed and "Traceback" not in printed
