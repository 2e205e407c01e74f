"""Files: whole or absent, full disks tried again, changed lines noticed."""

import errno
import resource

import pytest

from icet_jax import files, main
from icet_jax.errors import UserError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(files, "_WAITS", (0.0, 0.0))


def full(times, function):
    """`function`, which finds the disk full so many times before."""
    left = [times]

    def write(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments)

    return write


@pytest.mark.parametrize(("write", "name"), [(files.write_text_atomic, "_replace"), (files.append_text, "_append")])
def test_a_full_disk_is_tried_again_within_bounds(write, name, monkeypatch, tmp_path):
    own = getattr(files, name)
    monkeypatch.setattr(files, name, full(2, own))
    write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    monkeypatch.setattr(files, name, full(3, own))
    with pytest.raises(UserError, match="file: cannot be written to .No space left on device.; free space") as caught:
        write(tmp_path / "file", "other")
    assert caught.value.exit_code == 75 and (tmp_path / "file").read_text() == "text"


def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path):
    files.append_text(tmp_path / "file", "line\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(UserError, match="free space"):
            files.append_text(tmp_path / "file", "a longer line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").read_text() == "line\n"


def test_a_sealed_line_shows_every_change():
    row = {"text": 'odd \u2028 \U0001f600 }, "crc32": 1}', "number": 0.1, "none": None}
    line = files.seal(row)
    assert files.unseal(line) == row
    for place in range(len(line)):
        with pytest.raises(ValueError):
            files.unseal(line[:place] + chr(ord(line[place]) ^ 1) + line[place + 1 :])
        with pytest.raises(ValueError):
            files.unseal(line[:place])


def test_a_full_disk_that_nobody_expected_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(main, "run", full(1, None))
    assert main.main([]) == 75
    assert capsys.readouterr().err == (
        "icet-jax: a file of the run: cannot be written to (No space left on device); free space and start again\n"
    )
