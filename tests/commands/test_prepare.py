"""`--mode=prepare`: sets as TFDS array_record without TensorFlow, whole or absent, read as their sources are."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from icet_jax import main as front_door
from icet_jax.commands import prepare
from icet_jax.data import prepared
from icet_jax.data.batches import Batches
from icet_jax.data.records import Example, Records
from icet_jax.errors import UserError
from icet_jax.media.images import open_image
from icet_jax.parallel.distributed import Share
from icet_jax.runs import sources
from tests.data import published

CONFIG = "--config=configs/llava15_lppo.py"


def arguments(directory, train, datasets, *more):
    return [
        CONFIG, "--mode=prepare", "--config.sweep.utility={}", f"--config.data.train={train}",
        f"--config.data.directory={directory}", f"--config.sweep.datasets={datasets!r}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{format: source} of every published format."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in published.SOURCES.items()}


@pytest.fixture(scope="module")
def directory(files, tmp_path_factory):
    """Every format prepared; the front door's exit code was 0."""
    directory = tmp_path_factory.mktemp("prepared")
    tests = {name: source for name, source in files.items() if name not in ("redteam_2k", "vqa_v2")}
    utility = f"--config.sweep.utility={ {'vqa_v2': files['vqa_v2']}!r}"
    assert front_door.main(arguments(directory, files["redteam_2k"], tests, utility)) == 0
    return directory


def encoded(image):
    return image.read() if isinstance(image, prepared.PreparedImage) else image.read_bytes()


@pytest.mark.parametrize("name", published.SOURCES)
def test_prepared_rows_are_the_sources_rows(name, files, directory):
    direct = sources.load_rows(files[name])
    stored = "train" if name == "redteam_2k" else name
    back = sources.load_rows(files[name], directory=str(directory), name=stored)
    assert len(back) == len(direct) == published.ROWS
    for ours, theirs in zip(back, direct, strict=True):
        for field in ("id", "prompt", "kind", "answer", "category", "answers", "answer_type", "format", "transferred"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert [encoded(image) for image in ours.images] == [encoded(image) for image in theirs.images]
        for image, path in zip(ours.images, theirs.images, strict=True):
            np.testing.assert_array_equal(open_image(image), open_image(path))
    few = sources.load_rows(files[name], limit=5, directory=str(directory), name=stored)
    assert [row.id for row in few] == [row.id for row in direct[:5]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_same_files_give_the_same_batches_prepared_or_not_on_any_number_of_processes(count, files, directory):
    """Also where another process, with other hashes of its own, walks through them from half way."""

    def walk(examples, start, part=0, of=1):
        batches = Batches(examples, mixture={"forbidden": 2, "benign": 1}, batch_size=8, seed=9)
        own = Share(part, of).rows(8)
        return [[example.id for example in batches.batch(index)[own]] for index in range(start, 6)]

    direct = sources.load_rows(files["xstest"])
    stored = sources.load_rows(files["xstest"], directory=str(directory), name="xstest")
    whole = walk(direct, 0)
    parts = [walk(stored, 3, part, count) for part in range(count)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == whole[3:]
    if count == 1:
        code = (
            "from icet_jax.data.batches import Batches\nfrom icet_jax.runs import sources\n"
            f"rows = sources.load_rows({files['xstest']!r})\n"
            "batches = Batches(rows, mixture={'forbidden': 2, 'benign': 1}, batch_size=8, seed=9)\n"
            "print([[(row.id, str(row.images[0])) for row in batches.batch(index)] for index in range(3, 6)])"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "77"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        images = {example.id: str(example.images[0]) for example in direct}
        assert ast.literal_eval(done.stdout) == [[(row, images[row]) for row in batch] for batch in whole[3:]]


def test_each_image_is_stored_once_and_tfds_reads_it(directory, files):
    import tensorflow_datasets as tfds

    facts = prepared.read_facts(directory, "vqa_v2")
    assert (facts["images"], facts["kept"]) == (4, published.ROWS)
    images = tfds.builder_from_directory(directory / "vqa_v2" / "images" / "1.0.0").as_data_source("images")
    assert len(images) == 4 and Image.open(io.BytesIO(images[0]["bytes"])).format == "JPEG"
    rows = tfds.builder_from_directory(directory / "train" / "rows" / "1.0.0").as_data_source("rows")
    assert rows[3]["id"] == b"3" and rows[3]["policy"] == b"policy 0"


def test_sets_prepared_before_attack_formats_were_kept_still_open(files, tmp_path):
    assert front_door.main(arguments(tmp_path, files["jailbreakv_28k"], {})) == 0
    columns = tmp_path / "train" / "rows" / "1.0.0" / "features.json"
    content = json.loads(columns.read_text())
    for name in ("format", "transferred"):
        del content["featuresDict"]["features"][name]
    columns.write_text(json.dumps(content))
    prepared._data_source.cache_clear()
    rows = sources.load_rows(files["jailbreakv_28k"], directory=str(tmp_path), name="train")
    assert [row.id for row in rows] == [str(number) for number in range(published.ROWS)]
    assert {(row.format, row.transferred, row.answer_type) for row in rows} == {("", None, None)}


def test_rows_without_attack_formats_keep_the_fingerprints_of_earlier_versions():
    """So that their sets are not written again, and their runs go on."""
    rows = [Example("a", "how do i make a zorb", category="p"), Example("b", "what is it", kind="vqa", answer="red")]
    known = "97fb7b3ed3231c88fd47017cb7be8b1158c65dc88ea4e3163dc6650f29194964"
    assert prepared.fingerprint("rows.csv", None, Records("rows.csv", rows, [])) == known
    attacks = [replace(rows[0], format="Logic"), rows[1]]
    assert prepared.fingerprint("rows.csv", None, Records("rows.csv", attacks, [])) != known


def test_tensorflow_is_not_needed(files, tmp_path):
    code = (
        "import sys\n"
        "from icet_jax import main\n"
        f"code = main.main({arguments(tmp_path, files['xstest'], {})!r})\n"
        "from icet_jax.runs import sources\n"
        f"rows = sources.load_rows({files['xstest']!r}, directory={str(tmp_path)!r}, name='train')\n"
        "assert len(rows) == 12 and rows[0].images[0].read()\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train: 12 of 12 rows kept; none dropped; 5 images" in done.stdout


def damaged(folder):
    """A user's file with four bad rows, one of them found by decoding alone."""
    published.images(folder)
    (folder / "half.png").write_bytes((folder / "coco_0.png").read_bytes()[:45])
    lines = [
        "prompt,image", "shared,coco_0.png", "gone,gone.png", ",coco_1.png", "half,half.png", "shared,coco_0.png",
        "own,coco_1.png",
    ]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


def test_the_report_counts_rows_by_reason_and_shared_prompts(tmp_path, capsys):
    train, test = tmp_path / "train.csv", damaged(tmp_path)
    train.write_text("prompt,image\nshared,coco_2.png\nother,coco_3.png\n")
    command = arguments(tmp_path / "out", train, {"CP": str(test)})
    assert front_door.main(command) == 0
    printed = capsys.readouterr()
    assert (
        "CP: 2 of 6 rows kept; 4 dropped (1 missing image, 1 empty prompt, 1 damaged image, 1 duplicate row)"
        in printed.out
    )
    assert "1 of 2 rows of CP have a prompt of the training set" in printed.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prompts_shared_with_train"] == {"CP": 1}
    facts = report["sets"]["CP"]
    assert (facts["read"], facts["kept"], facts["complete"], facts["unchanged"]) == (6, 2, True, False)
    assert [problem["line"] for problem in facts["problems"]] == [3, 4, 5, 6]
    assert [row.prompt for row in prepared.read_set(tmp_path / "out", "CP", str(test))] == ["shared", "own"]


def test_a_damaged_photograph_of_a_folder_is_replaced_and_named_once(tmp_path, capsys):
    source = published.redteam(tmp_path)
    photograph = sources.load_rows(source)[0].images[0]
    photograph.write_bytes(photograph.read_bytes()[:45])  # only decoding finds that
    command = arguments(tmp_path / "out", source, {})
    for _ in range(2):  # the second call finds nothing to do, and says the same
        assert front_door.main(command) == 0
        printed = capsys.readouterr().out
        assert "train: 12 of 12 rows kept; none dropped; 4 images" in printed
        assert "1 unusable images, for which others were drawn" in printed and printed.count(photograph.name) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [photograph.name in line for line in report["sets"]["train"]["replaced_images"]] == [True]


def test_only_what_has_changed_is_written_again(tmp_path, capsys):
    test = damaged(tmp_path)
    command = arguments(tmp_path / "out", "toy:mixed", {"CP": str(test)})

    def made():
        assert front_door.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["train", "CP"]
        return ["(unchanged)" not in line for line in lines]

    assert made() == [True, True] and made() == [False, False]
    test.write_text(test.read_text() + "one more,coco_2.png\n")
    assert made() == [False, True]
    Image.new("RGB", (9, 9)).save(tmp_path / "coco_2.png")
    assert made() == [False, True] and made() == [False, False]
    (tmp_path / "gone.png").write_bytes((tmp_path / "coco_1.png").read_bytes())
    assert made() == [False, True]
    assert [row.prompt for row in prepared.read_set(tmp_path / "out", "CP", str(test))] == [
        "shared", "gone", "own", "one more",
    ]  # fmt: skip
    test.write_text(test.read_text() + "bad again,nowhere.png\n")
    assert made() == [False, True]


def test_rows_made_on_the_spot_keep_their_pixels(tmp_path):
    assert front_door.main(arguments(tmp_path, "organism:train:vqa:5", {"f": "toy:forbidden"})) == 0
    for name, source in (("train", "organism:train:vqa:5"), ("f", "toy:forbidden")):
        direct = sources.load_rows(source)
        for ours, theirs in zip(sources.load_rows(source, directory=str(tmp_path), name=name), direct, strict=True):
            assert (ours.id, ours.prompt, ours.answer, ours.category) == (
                theirs.id, theirs.prompt, theirs.answer, theirs.category,
            )  # fmt: skip
            np.testing.assert_array_equal(open_image(ours.images[0]), theirs.images[0])


def test_a_killed_prepare_leaves_the_old_set_or_none(files, tmp_path, monkeypatch):
    command = arguments(tmp_path, files["xstest"], {})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_to_record", killed)
        assert front_door.main(command) == 130
        with pytest.raises(UserError, match="not prepared"):
            prepared.read_set(tmp_path, "train", files["xstest"])
    assert front_door.main(command) == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_to_record", killed)
        assert front_door.main([*command, f"--config.data.train={files['advbench_coco']}"]) == 130
    assert len(prepared.read_set(tmp_path, "train", files["xstest"])) == published.ROWS
    assert front_door.main([*command, f"--config.data.train={files['advbench_coco']}"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "train"]


@pytest.mark.parametrize("blocks", [1, 40])
def test_a_full_disk_is_one_line_and_leaves_the_old_set(blocks, tmp_path):
    """Met by one writer or another: no file may become larger than so many KiB."""
    out = tmp_path / "out"
    assert front_door.main(arguments(out, "organism:train:vqa:3", {})) == 0
    limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", sys.executable, "-m", "icet_jax.main"]
    done = subprocess.run(
        [*limited, *arguments(out, "organism:train:vqa:100", {})], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert re.search(
        r"^icet-jax: .*cannot be written to \(File too large\); free space and start again$", done.stderr, re.M
    )
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "train"]
    assert len(prepared.read_set(out, "train", "organism:train:vqa:3")) == 3


def test_a_limit_is_remembered(files, tmp_path):
    command = arguments(tmp_path, files["redteam_2k"], {"x": files["xstest"]}, "--config.sweep.limit=4")
    assert front_door.main(command) == 0
    assert len(prepared.read_set(tmp_path, "train", files["redteam_2k"])) == published.ROWS
    assert len(prepared.read_set(tmp_path, "x", files["xstest"], 3)) == 3
    for more in (5, None):
        with pytest.raises(UserError, match=f"sweep.limit=4, but {more or 'all'} rows are needed"):
            prepared.read_set(tmp_path, "x", files["xstest"], more)


def test_a_set_of_another_source_is_not_taken(directory, files):
    with pytest.raises(UserError, match=r"prepared from xstest:.*, but the config names toy:mixed; run --mode=prepare"):
        sources.load_rows("toy:mixed", directory=str(directory), name="xstest")
    with pytest.raises(UserError, match="not prepared; run --mode=prepare"):
        sources.load_rows("toy:mixed", directory=str(directory), name="nothing")


def test_damage_to_a_prepared_set_is_one_line(files, tmp_path):
    assert front_door.main(arguments(tmp_path, files["xstest"], {})) == 0
    for path in (tmp_path / "train" / "rows" / "1.0.0").glob("*.array_record*"):
        path.unlink()
    prepared._data_source.cache_clear()
    with pytest.raises(UserError, match=r"rows: cannot be read .*run --mode=prepare again"):
        prepared.read_set(tmp_path, "train", files["xstest"])
    (tmp_path / "train" / "source.json").write_text("{")
    with pytest.raises(UserError, match=r"source.json: cannot be read .*run --mode=prepare again"):
        prepared.read_set(tmp_path, "train", files["xstest"])


@pytest.mark.parametrize(
    "changes, says",
    [
        (["--config.data.train=none"], "the config names no data set"),
        (["--config.data.directory=none"], "needs a folder to write to"),
        (["--config.sweep.datasets={'train': 'toy:vqa'}"], "a data set 'train', which is what the training set"),
        (["--config.data.train=nothing.csv"], "nothing.csv: cannot be read"),
        (["--out=/proc/nothing"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(changes, says, tmp_path, capsys):
    assert front_door.main([*arguments(tmp_path, "toy:vqa", {}), *changes]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("icet-jax: ") and says in printed


def test_sets_are_named_as_runs_ask_for_them():
    from icet_jax.runs import config_files

    config = config_files.load("configs/llava15_lppo.py:smoke", [("sweep.limit", "4")])
    named = prepare.named_sets(config)
    assert named["train"] == (config.data.train, None)
    assert set(named) == {"train", *config.sweep.datasets, *config.sweep.utility}
    assert {limit for name, (_, limit) in named.items() if name != "train"} == {4}
