"""The card says what the run directory says, leaks no path, and lets no string become markup."""

import json
import re

import pytest
import yaml

from icet_jax.errors import UserError
from icet_jax.runs.model_card import text, write_model_card
from tests.report import synthetic


def front_matter(card):
    head, matter, body = card.split("---\n", 2)
    assert head == ""
    return yaml.safe_load(matter), body


def change(path, **fields):
    """Sets dotted fields of a JSON file ("a__b")."""
    values = json.loads(path.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    path.write_text(json.dumps(values))


@pytest.fixture
def run(tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    change(
        run / "config.json",
        model__checkpoint="llava-hf/llava-1.5-7b-hf",
        model__revision="abc123",
        data__train="redteam_2k:/home/someone/RedTeam_2K.csv?images=/home/someone/coco&seed=3 + /home/someone/more.csv",
        reward__model="/home/someone/models/harmless-rm",
        sweep__datasets={"forbidden": "/home/someone/test.csv"},
    )
    (run / "data.json").write_text(
        json.dumps({"rows": {"train": {"forbidden": 2000}}, "prompts_shared_with_train": {"forbidden": 7}})
    )
    return run


def line(card, start):
    (found,) = [line for line in card.splitlines() if line.startswith(start)]
    return found


def section(card, dataset):
    return card.split(f"### {dataset}")[1].split("\n#")[0]


def test_the_front_matter_is_yaml_that_names_the_base(run):
    matter, _ = front_matter(text(run))
    assert matter["base_model"] == "llava-hf/llava-1.5-7b-hf" and matter["base_model_relation"] == "finetune"
    assert matter["library_name"] == "transformers" and "icet" in matter["tags"] and "license" not in matter
    matter, body = front_matter(text(run, form="adapter"))
    assert matter["library_name"] == "peft" and matter["base_model_relation"] == "adapter"
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER")' in body


def test_the_facts_are_the_runs(run):
    card = text(run)
    assert line(card, "| Base model |") == "| Base model | llava-hf/llava-1.5-7b-hf, revision abc123 |"
    assert line(card, "| Iterations |") == "| Iterations | 47 of 48 |"
    sources = "redteam\\_2k:RedTeam\\_2K.csv?images=coco&amp;seed=3 + more.csv"
    assert f"{sources} (forbidden: 2000)" in line(card, "| Training data |")
    assert line(card, "| Test prompts").endswith("| forbidden: 7 |")
    assert line(card, "| Exits during training |").endswith("| stratified |")
    assert line(card, "| `lppo.kl_coef` |") == "| `lppo.kl_coef` | 0.05 |"
    assert "None is set here" in card and "## Limits" in card and "## Responsible use" in card
    assert "/home/someone" not in card and "harmless-rm" in card and "### forbidden (test.csv)" in card


def test_the_table_holds_the_groups_before_and_after(run):
    sweeps = {phase: json.loads((run / f"sweeps/{phase}.forbidden.json").read_text()) for phase in ("before", "after")}
    means = [100 * sweep["groups"]["early"]["metrics"]["asr/world_exact"]["mean"] for sweep in sweeps.values()]
    card = text(run)
    forbidden = section(card, "forbidden")
    assert line(forbidden, "| metric | early | middle | late | average |")
    row = line(forbidden, "| Attack success rate: asr/world\\_exact |")
    assert f"| {means[0]:.1f}% → {means[1]:.1f}% (−" in row and row.count("→") == 4
    assert "### vqa" in card and "Response length" not in card


def test_any_exit_stands_beside_the_worst_exit(run):
    assert "worst exit" not in section(text(run), "forbidden"), "an earlier version measured it"
    for side, (mean, low, high, errors) in {
        "before": (1.0, 0.9, 1.0, 0), "after": (0.04, 0.02, 0.08, 3), "difference": (-0.96, -0.99, -0.9, 3)
    }.items():  # fmt: skip
        estimate = {"mean": mean, "ci95": [low, high], "n": 256, "n_error": errors}
        change(run / f"sweeps/{side}.forbidden.json", any_exit={"asr_any/world_exact": estimate})
    rows = section(text(run), "forbidden")
    assert "| attack success rate | worst exit | prompts with an unsafe answer at one exit at least |" in rows
    row = line(rows, "| asr/world\\_exact |")
    assert re.match(r"\| asr/world.* \| \S+% \(.*\) at exit \d → \S+% \(.*\) at exit \d \| ", row)
    assert row.endswith(
        "| 100% (90.0% to 100%) → 4.0% (2.0% to 8.0%); change −96.0 (−99.0 to −90.0); not known: 0 → 3 |"
    )
    for side in ("before", "after", "difference"):
        change(run / f"sweeps/{side}.forbidden.json", any_exit={"asr_any@5/world_exact": estimate})
    for side in ("before", "after"):
        change(run / f"sweeps/{side}.forbidden.json", generation__attempts=5)
    assert "| prompts with an unsafe answer at one exit at least, in one of 5 attempts |" in section(
        text(run), "forbidden"
    )


def test_errors_of_a_judge_are_counted(run):
    path = run / "sweeps/after.forbidden.json"
    values = json.loads(path.read_text())
    values["groups"]["late"]["metrics"]["asr/world_exact"] |= {"n_error": 5}
    path.write_text(json.dumps(values))
    row = line(section(text(run), "forbidden"), "| Attack success rate: asr/world\\_exact |")
    assert row.count("not judged: 0 → 5") == 1


def test_exits_that_fill_no_group_are_columns(run):
    for path in (run / "sweeps").glob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"groups": {}, "layers": values["layers"][::3]}))
    assert "| metric | exit 1 | exit 4 | exit 7 |" in text(run)


def test_a_run_that_is_not_finished_has_a_card(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    matter, body = front_matter(text(bare))
    assert "base_model" not in matter and "Not measured" in body and "an unnamed model" in body
    before = synthetic.write_run(tmp_path / "before", after=False, parts=("config",))
    card = text(before)
    assert "has not been measured" in card and "0 of 48" in card and "→ " not in card.split("### ")[1]


def test_a_local_base_is_not_given_out_as_a_hub_id(run, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    change(run / "config.json", model__checkpoint="models/mine", model__revision=None)
    matter, body = front_matter(text(run))
    assert "base_model" not in matter and "| Base model | mine |" in body


HOSTILE = 'x|y`z`*[a](http://b)<script>alert("1")</script>\n---\n# big\u202e'


def test_no_string_becomes_markup(run):
    change(
        run / "config.json",
        model__checkpoint=HOSTILE,
        model__revision=HOSTILE,
        data__train=HOSTILE,
        lppo__exits=HOSTILE,
        sweep__datasets={"forbidden": HOSTILE},
    )
    change(run / "data.json", rows={"train": {HOSTILE: 3}})
    change(run / "sweeps/before.forbidden.json", exit_definition=HOSTILE)
    matter, body = front_matter(text(run))
    assert set(matter) == {"library_name", "pipeline_tag", "tags"}
    assert "<script" not in body and "\u202e" not in body and "\n# big" not in body and "[a](" not in body
    table = body[body.index("| Base model") : body.index("Its settings")].strip().splitlines()
    assert all(row.replace("\\|", "").count("|") == 3 for row in table)
    setting = line(body, "| `lppo.exits`")
    assert setting.replace("\\`", "").count("`") == 2 and setting.replace("\\|", "").count("|") == 3


def test_it_is_written_whole_and_broken_files_are_one_line(run, tmp_path):
    path = write_model_card(tmp_path / "hf", run)
    assert path.name == "README.md" and path.read_text(encoding="utf-8") == text(run)
    (run / "cost.json").write_text("{")
    with pytest.raises(UserError, match="cost.json"):
        text(run)
