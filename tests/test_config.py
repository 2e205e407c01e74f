"""Every wrong field and value is one line that names the field, and the nearest one where it is misspelt."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from icet_jax import config as icet_config
from icet_jax.config.fields import Field
from icet_jax.errors import UserError
from icet_jax.runs import config_files

CONFIGS = sorted(path.stem for path in (Path(icet_config.__file__).parents[2] / "configs").glob("*.py"))


def write_config(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    indented = "\n".join("    " + line for line in body.splitlines())
    path.write_text(
        "from icet_jax import config as icet_config\n\n\n"
        f"def get_config(variant=''):\n    config = icet_config.default()\n{indented}\n    return config\n"
    )
    return str(path)


def test_the_defaults_are_valid():
    icet_config.check(icet_config.default())
    icet_config.check(icet_config.organism())


def test_every_field_of_a_config_is_declared_with_a_meaning_and_a_default_that_its_rule_allows():
    values = icet_config.flatten(icet_config.default())
    assert set(values) == set(icet_config.FIELDS)
    for name, field in icet_config.FIELDS.items():
        assert field.about.endswith((".", ".)")), name
        assert values[name] == field.default, name
        assert field.rule is None or field.default is None or field.rule.accepts(field.default), name


@pytest.mark.parametrize("arguments", [(1, ""), (None, "Unset, and of no type.")])
def test_a_field_without_a_meaning_or_a_type_cannot_be_declared(arguments):
    with pytest.raises(ValueError, match="a field"):
        Field(*arguments)


def test_a_default_cannot_be_changed_by_a_config_that_starts_from_it():
    config = icet_config.default()
    with config.unlocked():
        config.data.mixture.vqa = 0.5
    assert icet_config.default().data.mixture.to_dict() == {"forbidden": 1.0}


@pytest.mark.parametrize(
    ("section", "name", "value", "says"),
    [
        ("lppo", "fixed_exit", "late", "config.lppo.fixed_exit is 'late', but must be a whole number"),
        ("lppo", "value_learning_rate", "fast", "config.lppo.value_learning_rate is 'fast', but must be a number"),
        ("rm", "template", 3, "config.rm.template is 3, but must be text"),
        ("data", "mixture", 1.0, "config.data.mixture is 1.0, but must be a dict such as {'a': 1}"),
    ],
)
def test_a_section_without_its_types_is_checked_for_them(section, name, value, says):
    """A section that a file replaces by a plain dict has lost the types of its fields."""
    values = icet_config.default().to_dict()
    values[section][name] = value
    with pytest.raises(UserError, match=re.escape(says)):
        icet_config.check(ConfigDict(values))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_from_any_working_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_files.load(f"configs/{name}.py")
    # A config of --mode=reward makes the reward model that the others name.
    icet_config.require(config, "model.checkpoint", *([] if name == "rm_gpt2" else ["reward.model"]))


PAPER = {"llava15": ("13b",), "llava_next": ("13b", "mistral"), "llama32v": ("E2", "E5"), "smolvlm": ("256m", "2b"),
         "qwen25vl": ("3b", "32b")}  # fmt: skip
EXPERIMENTS = [(family, variant) for family, variants in PAPER.items() for variant in ("", "smoke", *variants)]


@pytest.mark.parametrize(("family", "variant"), EXPERIMENTS)
def test_the_papers_experiment_names_its_sets_and_defines_its_scorers(family, variant):
    configs = [config_files.load(f"configs/{family}_{kind}.py{f':{variant}' * bool(variant)}") for kind in KINDS]
    for config in configs:
        icet_config.require(config, "data.train", "sweep.datasets", "sweep.utility", "reward.model")
        used = {*config.sweep.scorers, *config.sweep.utility_scorers, config.reward.model} - {"refusal_keywords"}
        assert used <= set(config.scorers)
        assert config.model.exit_rule == ({"E2": "E2", "E5": "E5"}.get(variant, "E1") if family == "llama32v" else None)
    first, second = (icet_config.flatten(config) for config in configs)
    # A sweep measures what L-PPO's own sweeps measure, on the same model.
    same = ("model.", "sweep.datasets", "sweep.utility", "sweep.max_new_tokens", "sweep.limit", "sweep.exits")
    assert {name: first[name] for name in first if name.startswith(same)} == {
        name: second[name] for name in second if name.startswith(same)
    }


@pytest.mark.parametrize("family", PAPER)
def test_mixed_adds_benign_and_vqa_rows_that_no_test_set_holds(family):
    alone, mixed = (config_files.load(f"configs/{family}_lppo.py{variant}") for variant in ("", ":mixed"))
    first, *others = mixed.data.train.split(" + ")
    assert first == alone.data.train and [source.partition(":")[0] for source in others] == ["captions", "vqa_v2"]
    assert all("train2014" in source and "val2014" not in source for source in others)
    assert alone.data.mixture.to_dict() == {"forbidden": 1.0}
    assert set(mixed.data.mixture) == {"forbidden", "benign", "vqa"} and mixed.reward.normalise
    before, after = icet_config.flatten(alone), icet_config.flatten(mixed)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"data.train", "data.mixture", "reward.by_kind", "reward.normalise"}


@pytest.mark.parametrize("family", PAPER)
def test_best_is_the_recommended_method_on_the_mixed_rows(family):
    mixed, best = (config_files.load(f"configs/{family}_lppo.py:{variant}") for variant in ("mixed", "best"))
    before, after = icet_config.flatten(mixed), icet_config.flatten(best)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"algorithm", "lsft.exits"} and best.algorithm == "lsft"
    assert best.lsft.iterations == mixed.lppo.iterations


KINDS = ("lppo", "sweep")
CHECKPOINTS = {
    "llava15": "llava-hf/llava-1.5-7b-hf",
    "llava15:13b": "llava-hf/llava-1.5-13b-hf",
    "llava_next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_next:13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava_next:mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llama32v": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama32v:E5": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llava15:smoke": "toy:llava15",
    "llava_next:smoke": "toy:llava_next",
    "llama32v:smoke": "toy:mllama",
    "smolvlm": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm:256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm:2b": "HuggingFaceTB/SmolVLM-Instruct",
    "smolvlm:smoke": "toy:smolvlm",
    "qwen25vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen25vl:3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen25vl:32b": "Qwen/Qwen2.5-VL-32B-Instruct",
    "qwen25vl:smoke": "toy:qwen2_5_vl",
}


@pytest.mark.parametrize("spec", CHECKPOINTS)
def test_each_family_and_variant_is_its_checkpoint(spec):
    family, _, variant = spec.partition(":")
    for kind in KINDS:
        config = config_files.load(f"configs/{family}_{kind}.py{f':{variant}' * bool(variant)}")
        assert config.model.checkpoint == CHECKPOINTS[spec]


def test_families_differ_in_the_model_and_its_memory_alone():
    base = icet_config.flatten(config_files.load("configs/llava15_lppo.py"))
    allowed = {"data.max_prompt_tokens", "lppo.accumulation", "sweep.batch_size"}
    for family in ("llava_next", "llama32v", "smolvlm", "qwen25vl"):
        other = icet_config.flatten(config_files.load(f"configs/{family}_lppo.py"))
        differing = {name for name in base if base[name] != other[name]}
        assert {name for name in differing if not name.startswith("model.")} <= allowed
        assert config_files.load(f"configs/{family}_lppo.py").sweep.exits == "all"


def test_a_scorer_is_changed_from_the_command_line():
    changes = [
        ("scorers.llama_guard_3.batch_size", "8"),
        ("scorers.toxic_bert.heads", "insult,threat"),
        ("scorers.mine", "{'kind': 'toxicity', 'checkpoint': 'DIR'}"),
    ]
    config = config_files.load("configs/llava15_sweep.py", changes)
    assert config.scorers.llama_guard_3.batch_size == 8 and config.scorers.toxic_bert.heads == ("insult", "threat")
    assert config.scorers.mine.to_dict() == {"kind": "toxicity", "checkpoint": "DIR"}
    with pytest.raises(UserError, match="a toxicity has kind, heads, checkpoint"):
        config_files.load("configs/llava15_sweep.py", [("scorers.toxic_bert.head", "insult")])


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        ({"kind": "lama_guard"}, "must be {'kind': one of"),
        ({"kind": "toxicity"}, "checkpoint is missing"),
        ({"kind": "toxicity", "checkpoint": "x", "head": ("a",)}, "did you mean heads"),
        ({"kind": "toxicity", "checkpoint": "x", "dtype": "float16"}, "one of float32, bfloat16"),
        ({"kind": "decoder_judge", "checkpoint": "x", "max_new_tokens": "5"}, "a whole number"),
        ({"kind": "ensemble", "members": {}}, "a dict such as"),
        ("llama_guard", "must be {'kind': one of"),
        (
            {"kind": "perspective", "attributes": ("TOXICITY",)},
            r"the Perspective API ended on 2026-12-31; use kind: toxicity \(Detoxify-type checkpoint\) or kind: chat",
        ),
        ({"kind": "chat", "model": "m", "template": "harmbench"}, "endpoint is missing"),
        ({"kind": "chat", "endpoint": "http://localhost/v1", "template": "harmbench"}, "model is missing"),
        ({"kind": "chat", "endpoint": "http://localhost/v1", "model": "m"}, "template is missing"),
        ({"kind": "chat", "checkpoint": "x"}, "a chat has kind, endpoint, model"),
        ({"kind": "chat", "timeout": "30"}, "a number"),
    ],
)
def test_a_wrong_scorer_is_one_clear_line(definition, says):
    with pytest.raises(UserError, match=says) as caught:
        config_files.load("configs/llava15_sweep.py", [("scorers", repr({"mine": definition}))])
    assert "config.scorers.mine" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["default_exit", "per_batch", "per_example"])
def test_variants_change_the_exit_schedule(variant):
    expected = "fixed" if variant == "default_exit" else variant
    assert config_files.load(f"configs/organism_lppo.py:{variant}").lppo.exits == expected
    lsft = config_files.load(f"configs/organism_lsft.py:{variant}")
    assert (lsft.algorithm, lsft.lsft.exits) == ("lsft", expected)


GROUPED = [("algorithm", "lrloo"), ("data.batch_size", "128")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([("lrloo.group_size", "1")], "must be 2 or more: a response is compared with the others of its group"),
        ([("lrloo.group_size", "3")], "batch_size 128 counts responses and does not divide into groups of 3"),
        ([("lppo.baseline", "exit_kind"), ("lppo.whiten_advantages", "false")], "exit_kind needs .*whiten_advantages"),
        ([("lppo.kl_coef_by_kind", "{'benign': -1.0}")], "kl_coef_by_kind.benign is -1.0, but must be a factor, 0 or"),
    ],
)
def test_groups_and_baselines_that_mean_nothing_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        config_files.load("configs/organism_lppo.py", [*GROUPED, *changes])


def test_only_an_algorithm_with_groups_asks_for_them():
    alone = config_files.load("configs/organism_lppo.py", [("lrloo.group_size", "3")])
    grouped = config_files.load("configs/organism_lrloo.py:grpo")
    assert (icet_config.group_size(alone), icet_config.group_size(grouped)) == (1, 4)
    assert (grouped.algorithm, grouped.lrloo.advantage) == ("lrloo", "grpo")


def test_a_config_is_read_without_jax():
    code = (
        "import sys; from icet_jax.runs import config_files; config_files.load('configs/organism_lppo.py');"
        "bad = {'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_overrides_are_read_by_the_type_of_the_field():
    overrides = {
        "lppo.kl_coef": "0.1",
        "lppo.iterations": "7",
        "lppo.kl_adaptive": "false",
        "lppo.fixed_exit": "5",
        "data.image_root": "photos",
        "lora.targets": "q_proj,v_proj",
        "seeds": "(1, 2)",
        "data.mixture.vqa": "0.25",
        "sweep.datasets": "{'mine': 'mine.csv'}",
        "sweep.utility.more": "more.jsonl",
        "sweep.exits": "1,12,23",
        "sweep.limit": "none",
    }
    config = config_files.load("configs/llava15_lppo.py", overrides.items())
    assert (config.lppo.kl_coef, config.lppo.iterations, config.lppo.kl_adaptive) == (0.1, 7, False)
    assert (config.lppo.fixed_exit, config.data.image_root, config.seeds) == (5, "photos", (1, 2))
    assert config.lora.targets == ("q_proj", "v_proj")
    assert config.data.mixture.to_dict() == {"forbidden": 1.0, "vqa": 0.25}
    assert config.sweep.datasets.to_dict() == {"mine": "mine.csv"}
    assert config.sweep.utility.to_dict() == {"vqa_v2": config.sweep.utility.vqa_v2, "more": "more.jsonl"}
    assert (config.sweep.exits, config.sweep.limit) == ((1, 12, 23), None)


def test_a_field_is_read_alike_whatever_it_held_before():
    config = config_files.load(None, [("sweep.exits", "1,2"), ("sweep.exits", "all"), ("sweep.limit", "3")])
    assert (config.sweep.exits, config.sweep.limit) == ("all", 3)
    assert config_files.load(None, [("sweep.exits", "all"), ("sweep.exits", "3,")]).sweep.exits == (3,)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("lppo.kl_coeff", "1", "nearest is config.lppo.kl_coef"),
        ("kl_coef", "1", "nearest is config.lppo.kl_coef"),
        ("lpo.kl_coef", "1", "nearest is config.lppo.kl_coef"),
        ("learning_rate", "1", "nearest is config.optimizer.learning_rate"),
        ("lppo.kl_coef.x", "1", "config.lppo.kl_coef"),
        ("lppo", "1", "not a field"),
        ("zzzzzz", "1", "see icet_jax/config/defaults.py"),
        ("lppo.kl_coef", "abc", "a number"),
        ("lppo.kl_coef", "nan", "must be a number"),
        ("lppo.kl_coef", "-1", "0 or more"),
        ("lppo.iterations", "2.5", "a whole number"),
        ("lppo.kl_adaptive", "maybe", "true or false"),
        ("lppo.kl_kind", "k4", "one of k1, k2, k3"),
        ("lppo.fixed_exit", "0", "from 1"),
        ("lppo.minibatches", "3", "does not divide"),
        ("lppo.dual_clip", "0.5", "must be 0, which is off, or above 1"),
        ("lppo.max_ratio", "1", "must be 0, which is off, or above 1"),
        ("model.dtype", "float16", "one of float32, bfloat16"),
        ("lora.targets", "q_proj,qproj", "distinct names"),
        ("seeds", "1,1", "distinct"),
        ("sweep.exits", "0,1", "from 1"),
        ("sweep.exits", "late", "from 1"),
        ("sweep.top_k", "5", "need config.sweep.temperature"),
        ("lppo.train_exits", "1,1", "each once"),
        ("lppo.train_exits", "0,1", "from 1"),
        ("sweep.attempts", "5", "config.sweep.attempts=5 needs config.sweep.temperature above 0"),
        ("sweep.scorers", "", "at least one"),
        ("sweep.datasets", "[1]", "a dict"),
        ("sweep.datasets.a/b", "x.csv", "letters, digits"),
        ("data.mixture.vqu", "0.3", "did you mean vqa"),
        ("data.mixture.vqa", "-0.3", "a share"),
        ("data.mixture", "{'forbidden': 0}", "no rows"),
        ("reward.by_kind.vqa", "gold", "one of reward_model, exact_match, none"),
        ("mesh.fsdp", "-1", "only one axis"),
        ("scorers", "{1: 2}", "1 is not a name; put it in quotes"),
        ("scorers", "{'a': {1: 2, 'kind': 'keywords'}}", "config.scorers.a: 1 is not a name"),
        ("sweep.datasets", "{1: 'toy:mixed'}", "config.sweep.datasets: 1 is not a name"),
        ("data.mixture", "{1: 2}", "1 is not a name"),
    ],
)
def test_a_wrong_override_is_one_clear_line(name, text, says):
    with pytest.raises(UserError, match=says) as caught:
        config_files.load("configs/organism_lppo.py", [(name, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("config.lppo.kl_coeff = 0.1", r"mine.py:6: config.kl_coeff .*nearest is config.lppo.kl_coef"),
        ("config.lppo.kl_coef = 'x'", r"mine.py:6: .*float"),
        ("config.lppo.kl_coef = config.lppo.kl_coeff", r"mine.py:6: .*nearest is config.lppo.kl_coef"),
        ("config.lppo.epochs = True", "config.lppo.epochs is True, but must be a whole number"),
        ("config.lppo = {'kl_coef': 0.1}", "config.lppo.accumulation is missing"),
        ("config.data.mixture = {'harmful': 1.0}", "config.data.mixture.harmful"),
        ("1 / 0", "mine.py:6: ZeroDivisionError"),
        ("return None", "returned NoneType"),
    ],
)
def test_a_wrong_config_file_is_one_clear_line(body, says, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        config_files.load(write_config(tmp_path, body))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_config_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no such file; this project has .*configs/organism_lppo.py"):
        config_files.load("configs/organism_lpo.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="has no get_config"):
        config_files.load(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        config_files.load(str(tmp_path / "broken.py"))
    with pytest.raises(UserError, match="variant 'per_exampel'.*did you mean per_example"):
        config_files.load("configs/organism_lppo.py:per_exampel")
    with pytest.raises(UserError, match="has no variants"):
        config_files.load("configs/organism_control.py:smoke")


def test_exits_are_checked_against_the_model():
    config = config_files.load("configs/organism_lppo.py", [("lppo.fixed_exit", "8")])
    icet_config.check_exits(config, 8)
    with pytest.raises(UserError, match="config.lppo.fixed_exit names exit 8, but this model's exits are 1 to 7"):
        icet_config.check_exits(config, 7)
    config = config_files.load("configs/organism_lppo.py", [("lppo.train_exits", "1,9")])
    with pytest.raises(UserError, match="config.lppo.train_exits names exit 9"):
        icet_config.check_exits(config, 8)
    config = config_files.load("configs/organism_lppo.py", [("sweep.exits", "1,9")])
    with pytest.raises(UserError, match="config.sweep.exits names exit 9"):
        icet_config.check_exits(config, 8)


def test_a_missing_field_says_how_to_give_it():
    with pytest.raises(UserError, match="config.model.checkpoint is not set.*--config.model.checkpoint="):
        icet_config.require(icet_config.default(), "seed", "model.checkpoint")


@pytest.mark.parametrize("family", PAPER)
def test_the_guards_are_on_in_the_papers_configs_and_off_elsewhere(family):
    guards = ("target_kl", "max_ratio", "dual_clip")
    for variant in ("", ":mixed", ":smoke"):
        config = config_files.load(f"configs/{family}_lppo.py{variant}")
        assert all(config.lppo[guard] > 0 for guard in guards)
    assert not any(config.lppo[guard] for config in (icet_config.default(), icet_config.organism()) for guard in guards)


@pytest.mark.parametrize("family", PAPER)
def test_the_shipped_horizon_lets_the_kl_coefficient_move(family):
    """At TRL's 10,000 sequences a run moved it by 12 % at most."""
    config = config_files.load(f"configs/{family}_lppo.py")
    assert config.lppo.kl_adaptive
    step = 0.2 * config.data.batch_size / config.lppo.kl_horizon
    assert (1 + step) ** config.lppo.iterations > 3 and (1 - step) ** config.lppo.iterations < 1 / 3


def test_an_exit_schedule_that_cannot_do_what_is_asked_is_refused():
    fixed = [("lppo.exits", "fixed"), ("lppo.train_exits", "1,3")]
    with pytest.raises(UserError, match='config.lppo.exits is "fixed", which draws nothing: leave .*train_exits empty'):
        config_files.load("configs/organism_lppo.py", fixed)
    config_files.load("configs/organism_lppo.py", [("algorithm", "ldistill"), ("ldistill.exits", "adaptive")])
    for algorithm, more in (("lsft", []), ("ldistill", [("ldistill.on", "default")])):
        fields = [("algorithm", algorithm), (f"{algorithm}.exits", "adaptive"), *more]
        with pytest.raises(UserError, match=f"config.{algorithm}.exits is 'adaptive', which learns from answers"):
            config_files.load("configs/organism_lppo.py", fields)
