"""`--mode=plan`: what a run takes, from shapes alone and from compiled programs."""

import dataclasses
import importlib.util
import re
import types
from types import SimpleNamespace

import jax
import pytest

from icet_jax import main
from icet_jax.algorithms.base import PlannedPhase
from icet_jax.checkpoints.published import PUBLISHED, SCORERS, config_values
from icet_jax.commands import plan
from icet_jax.errors import UserError
from icet_jax.nn.protocols import count_parameters
from icet_jax.parallel import gpu_targets, topology
from icet_jax.parallel.mesh import abstract_mesh, make_mesh
from icet_jax.planning.advice import fixes
from icet_jax.planning.ahead import AbstractRun
from icet_jax.planning.kernels import ProgramCost
from icet_jax.planning.scorers import scorer_bytes
from icet_jax.planning.work import PhaseCost
from icet_jax.runs import sources
from icet_jax.runs.config_files import load
from icet_jax.scorers.networks import abstract_scorer
from icet_jax.training.loop import initial_state

LLAVA = "--config=configs/llava15_lppo.py"
ORGANISM = "configs/organism_lppo.py"
SMALL = [("data.batch_size", "8"), ("sweep.batch_size", "8"), ("lppo.max_new_tokens", "4")]
GIB = 2**30
PHASES = ["sweep: encode", "sweep: fill", "sweep: decode", "rollout", "prepare", "update"]


@pytest.fixture(autouse=True)
def without_compiler_for_gpus(monkeypatch):
    """GPUs are planned from shapes, also where they could be compiled for; tests/planning/test_gpu_programs.py does."""
    monkeypatch.setattr(gpu_targets, "PACKAGES", ("nobody.nothing",))


def planned(*flags, capsys):
    code = main.main(["--mode=plan", *flags])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    said = SimpleNamespace(out=" ".join(printed.out.split()), err=printed.err)  # lines are broken where they are long
    return code, phases(printed.out) if printed.out else {}, said


def phases(text):
    """{phase: values of its column, from top to bottom}."""
    above, *lines = text.split("\n\n")[0].splitlines()
    names, *rows = (re.split(r"\s{2,}", line.strip())[1:] for line in lines)
    groups = above.split() + [""] * (len(names) - len(above.split()))
    assert max(map(len, text.splitlines())) <= 100
    phases = [f"{group}: {name}" if group else name for group, name in zip(groups, names, strict=True)]
    return dict(zip(phases, map(list, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-hf/llava-1.5-7b-hf", 7_063_427_072),
        ("llava-hf/llava-1.5-13b-hf", 13_351_494_656),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", 7_063_431_168),
        ("llava-hf/llava-v1.6-mistral-7b-hf", 7_566_747_648),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", 10_670_220_835),
    ],
)
def test_published_models_have_their_published_sizes(name, parameters):
    config = load("configs/llava15_lppo.py", [("model.checkpoint", name)])
    mesh = abstract_mesh((8, 1, 1))
    assert count_parameters(AbstractRun(config, mesh).vlm.params) == parameters


def test_every_checkpoint_of_the_configs_is_known_and_others_are_refused():
    for config in ("llava15_lppo.py", "llava_next_lppo.py:13b", "llava_next_lppo.py:mistral", "llama32v_lppo.py"):
        assert load(f"configs/{config}", []).model.checkpoint in PUBLISHED
    with pytest.raises(UserError, match="give --checkpoint=DIR"):
        config_values("nobody/nothing-7b")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/LlamaGuard-7b", 6_738_415_616),
        ("meta-llama/Llama-Guard-3-8B", 8_030_261_248),
        ("cais/HarmBench-Llama-2-13b-cls", 13_015_864_320),
        ("unitary/toxic-bert", 109_486_854),
        ("unitary/unbiased-toxic-roberta", 124_657_936),
        ("Ray2333/gpt2-large-harmless-reward_model", 774_031_360),
        ("OpenAssistant/reward-model-deberta-v3-large-v2", 435_062_785),
    ],
)
def test_published_scorers_have_their_published_sizes(name, parameters):
    assert count_parameters(abstract_scorer(SCORERS[name], name)) == parameters


def test_scorers_are_counted_once_on_the_mesh_and_unknown_ones_named():
    config = load(
        "configs/llava15_lppo.py",
        [("reward.model", "nobody/reward"), ("sweep.scorers", "both,refusal_keywords,organism:judge,served")],
    )
    members = {"harmless_reward": 0.5, "general_reward": 0.5}
    config.scorers.served = {"kind": "chat", "endpoint": "http://localhost/v1", "model": "m", "template": "harmbench"}
    config.scorers.both = {"kind": "ensemble", "members": members}
    split, whole = (scorer_bytes(config, abstract_mesh(sizes)) for sizes in ((1, 16, 1), (16, 1, 1)))
    assert whole == {"nobody/reward": None, "harmless_reward": 4 * 774_031_360, "general_reward": 4 * 435_062_785}
    assert whole["general_reward"] / 16 < split["general_reward"] < whole["general_reward"] / 15
    counted, unknown = plan._scorer_remarks(config, abstract_mesh((1, 16, 1)))
    assert "harmless_reward 0.18" in counted and "general_reward 0.10" in counted
    assert unknown.endswith("unknown size: nobody/reward")


def test_what_lies_beside_a_program_is_no_room_for_it():
    chip = topology.CHIPS["v5e"]
    config = load("configs/llava15_lppo.py", [("lora.rank", "0")])
    mesh = abstract_mesh((1, 16, 1))
    run = AbstractRun(config, mesh)
    policy = 6_738_415_616 + 2 * 64 * 4096  # Vicuna, with the 64 tokens that LLaVA adds
    rooms = {
        phase.name: chip.memory - plan.memory_limit(chip, phase, judges=GIB) - GIB
        for phase in run.phases(lambda _: None)
    }
    assert rooms["sweep: encode"] == pytest.approx((2 + 12) * policy / 16, rel=0.01)
    assert rooms["rollout"] == pytest.approx((2 + 8) * policy / 16, rel=0.01)
    assert rooms["prepare"] == pytest.approx(8 * policy / 16, rel=0.02)
    assert rooms["update"] == pytest.approx(2 * policy / 16, rel=0.06)


def test_memory_from_shapes_alone_is_what_arithmetic_says(capsys):
    code, whole, printed = planned(LLAVA, "--topology=h100:8", capsys=capsys)
    assert code == 0 and "temporaries and what chips exchange are known only where" in printed.out
    assert float(whole["rollout"][0]) == pytest.approx(2 * 7_063_427_072 / GIB, abs=0.01)
    adapters = 64 * 32 * (4 * 8192 + 3 * (4096 + 11008))  # rank x layers x (in + out)
    assert float(whole["rollout"][1]) == pytest.approx(3 * 4 * adapters / GIB, abs=0.01)
    cache = 2 * 2 * 32 * (64 // 8) * (896 + 128) * 4096
    assert float(whole["rollout"][4]) == pytest.approx(cache / GIB, abs=0.01)
    judges = 2 * 6_738_415_616 + 4 * (109_486_854 + 774_031_360 + 435_062_785)  # Llama Guard in bfloat16
    assert float(whole["rollout"][2]) == pytest.approx(judges / GIB, abs=0.01)
    assert "llama_guard_1 12.55, toxic_bert 0.41" in printed.out
    assert {row[5] for row in whole.values()} == {"-"} and {row[7] for row in whole.values()} == {"unknown"}
    _, split, _ = planned(LLAVA, "--topology=h100:8", "--config.mesh.fsdp=8", "--config.mesh.data=1", capsys=capsys)
    assert float(split["update"][0]) == pytest.approx(2 * 7_063_427_072 / 8 / GIB, abs=0.02)


@pytest.mark.parametrize("config", ["llava_next_lppo.py", "llama32v_lppo.py"])
def test_the_other_families_are_planned_too(config, capsys):
    code, rows, printed = planned(f"--config=configs/{config}", "--topology=h200:8", capsys=capsys)
    assert code == 0 and list(rows) == PHASES
    assert float(rows["sweep: fill"][3]) > float(rows["sweep: encode"][3]) > 0 and float(rows["rollout"][4]) > 0


def test_what_does_not_fit_is_said_with_a_fix_that_fits(capsys):
    flags = (LLAVA, "--topology=a100:8", "--config.lora.rank=0")  # float32 masters and moments: 81 GB more
    code, rows, printed = planned(*flags, capsys=capsys)
    assert code == 1 and {row[7] for row in rows.values()} == {"NO"}
    fix = re.search(r"fix .*?(--config\.mesh\.data=-1) (--config\.mesh\.fsdp=\d+)", printed.out)
    code, rows, _ = planned(*flags, *fix.groups(), capsys=capsys)
    assert code == 0 and "NO" not in {row[7] for row in rows.values()}


def test_wrong_usage_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags, says in (
        ((), "needs --topology"),
        (("--topology=v5e:4x4",), "needs the `tpu` extra"),
        (("--topology=h100:8", "--config.mesh.fsdp=3"), "does not fit 8 devices"),
        (("--topology=h100:8", "--largest-batch"), "what fits h100 chips is not known"),
        (("--topology=h100:64", "--config.mesh.tensor=64"), "choose one of 1, 2, 4, 8, 16, 32"),
        (("--topology=h100:24",), "does not divide over the 24 devices of mesh.data x mesh.fsdp; choose 48 or 72"),
        (("--topology=h100:8", "--config.lppo.accumulation=7"), "does not divide into 1 mini-batches"),
    ):
        code, _, printed = planned(LLAVA, *flags, capsys=capsys)
        assert code == 2 and says in printed.err and printed.err.count("\n") == 1


def test_a_program_that_the_compiler_refuses_does_not_fit():
    def compile(compiler_options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
            "HLO temporaries (400.00G) exceeds available HBM (15.75G). HLO module: jit__lambda."
        )

    program, refused = plan._compile(PlannedPhase("rollout", None, None, lambda: SimpleNamespace(compile=compile)))
    assert program is None and refused == "the compiler needs 400.00GiB for it"
    line = plan.PlanLine("rollout", 1, 1, 1, 1, 1, None, PhaseCost(1, 1, 1), None, refused)
    assert line.fits(topology.CHIPS["v5e"]) is False


def test_a_product_without_a_kernel_is_compiled_in_another_way():
    tried = []

    def compile(compiler_options):
        tried.append(compiler_options)
        if not compiler_options:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.502")
        return "a program"

    program, refused = plan._compile(PlannedPhase("rollout", None, None, lambda: SimpleNamespace(compile=compile)))
    assert (program, refused) == ("a program", "") and tried == [{}, {"xla_gpu_enable_triton_gemm": False}]


def test_the_least_time_is_the_slowest_of_three_bounds():
    chip, gib = topology.CHIPS["v5e"], GIB
    line = plan.PlanLine("update", gib, 0, 0, 0, 0, 0, PhaseCost(10**15, 3, gib), 10 * gib)
    assert line.seconds(chip, 4) == (10**15 / (4 * 197e12), "products")
    assert line.seconds(chip, 400)[1] == "links" and line.seconds(topology.CHIPS["cpu"], 1) is None


def test_kernels_and_modelled_times_are_printed_of_programs_for_gpus_and_said_to_be_modelled():
    chips = topology.parse("h200:1")
    line = plan.PlanLine("update", GIB, 0, 0, 0, 0, GIB, PhaseCost(10**15, 3, GIB), 0)
    compiled = dataclasses.replace(line, program=ProgramCost(1676, 838, 10**15, 3 * GIB, 1.25))
    printed = plan.table([compiled, line], chips)
    for row in ("kernels 1676 -", "kernels / step 838 -", "traffic, GiB 3 -", "modelled s 1.25 -"):
        assert row in [" ".join(text.split()) for text in printed.splitlines()]
    assert "modelled" not in plan.table([line], chips) and line.fits(chips.chip) is True
    assert "modelled, not measured: every kernel at 780 Tflop/s or 4.3 TB/s" in plan._modelled_remark(chips.chip)


def test_compiled_for_this_machine_every_part_is_known_and_the_shapes_are_the_runs():
    config = load(ORGANISM, SMALL)
    lines, abstract = plan.plan(config, topology.parse("cpu:1"))
    assert [line.phase for line in lines] == PHASES
    assert all(line.temporaries and line.moved == 0 and line.work.flops > 0 for line in lines)
    assert lines[3].cache > 0 and lines[5].cache == 0

    from icet_jax.evaluation.batching import prompt_batch
    from icet_jax.runs import loading

    vlm = loading.load("organism:vlm")
    rows = sources.load_rows("organism:train")[:8]
    batch = prompt_batch(vlm, rows, 8, 1, length=config.data.max_prompt_tokens)
    state = initial_state(config, vlm, abstract.settings)
    real = (vlm.params, state, batch.images, batch.tokens, batch.mask)
    ours = (abstract.vlm.params, abstract.state, abstract.images(8), *abstract.prompts(8))

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)

    assert jax.tree.leaves(shapes(real)) == jax.tree.leaves(shapes(ours))
    assert lines[0].weights == sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params))


def test_both_trainings_of_a_warm_start_are_planned():
    chips = topology.parse("h100:8")
    runs = {
        name: load("configs/llava15_lppo.py", fields)
        for name, fields in {
            "lppo": [], "lsft": [("algorithm", "lsft")], "both": [("warm_start", "lsft")]
        }.items()
    }  # fmt: skip
    plans = {name: plan.plan(config, chips) for name, config in runs.items()}
    both, abstract = plans["both"]
    assert both[: len(PHASES)] == plans["lppo"][0]
    assert [line.phase for line in both[len(PHASES) :]] == ["warm start: update"]
    assert dataclasses.replace(both[-1], phase="update") == plans["lsft"][0][-1]
    assert [line.phase for line in plan.plan(runs["both"], chips, "sweep")[0]] == PHASES[:3]
    # An iteration is one of the run's own training.
    assert plan.remarks(runs["both"], both, abstract, chips) == plan.remarks(runs["lppo"], *plans["lppo"], chips)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")
def test_a_rollout_compiles_for_tpus_that_are_not_here():
    config = load(ORGANISM, [*SMALL, ("mesh.data", "1"), ("mesh.fsdp", "4")])
    abstract = AbstractRun(config, make_mesh(**config.mesh, devices=topology.parse("v5e:2x2").devices()))
    phase = next(phase for phase in abstract.phases(lambda phase: None) if phase.name == "rollout")
    program, refused = plan._compile(phase, plan.memory_limit(topology.CHIPS["v5e"], phase, judges=0))
    line = plan._line(abstract, phase, 0, program, refused, topology.CHIPS["v5e"])
    assert refused == "" and line.temporaries > 0 and line.moved > 0
    assert line.fits(topology.CHIPS["v5e"]) is True


def test_the_text_of_a_program_that_cannot_be_read_is_none():
    def unread() -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    assert plan._text(types.SimpleNamespace(as_text=unread)) is None


@pytest.mark.parametrize(
    ("phase", "fields", "says"),
    [
        ("update", {"model.remat": "none"}, "--config.model.remat=full"),
        ("update", {"data.batch_size": 128, "lppo.accumulation": 4}, "--config.lppo.accumulation=8"),
        ("update", {"data.batch_size": 64, "lppo.accumulation": 4}, "more chips along"),
        ("prepare", {"data.batch_size": 64, "lppo.accumulation": 2, "lppo.minibatches": 2}, "more chips along"),
        ("rollout", {"data.batch_size": 128, "lppo.accumulation": 4}, "--config.data.batch_size=64, or more chips"),
        ("rollout", {"data.batch_size": 64, "lppo.accumulation": 4}, "--config.data.batch_size=32, or"),
        ("rollout", {"data.batch_size": 16, "lppo.accumulation": 1}, "more chips along"),
        ("sweep: fill", {"sweep.batch_size": 32}, "--config.sweep.batch_size=16"),
        ("sweep: fill", {"sweep.batch_size": 16}, "more chips along"),
    ],
)
def test_the_fix_of_a_phase_divides_over_the_mesh(phase, fields, says):
    fields = {"lppo.minibatches": 1, "lppo.accumulation": 1, "model.remat": "full"} | fields
    config = load(ORGANISM, [(name, str(value)) for name, value in fields.items()])
    run = AbstractRun(config, abstract_mesh((1, 16, 1)))
    verdict, fix = fixes(config, run, [phase], 0, 16e9)
    assert verdict == f"does not fit: {phase}"
    assert fix.startswith(f"fix {phase} (then plan again): ") and says in fix


def test_an_algorithm_that_samples_nothing_is_planned_by_its_own_phases():
    config = load(ORGANISM, [*SMALL, ("algorithm", "lsft")])
    lines, abstract = plan.plan(config, topology.parse("cpu:1"), "training")
    assert [line.phase for line in lines] == ["update"]
    (update,) = lines
    assert update.temporaries and update.cache == 0 and update.work.flops > 0
    lppo = AbstractRun(load(ORGANISM, SMALL), abstract.mesh)
    assert lppo.algorithm.work(lppo)["update"].flops < update.work.flops  # L-SFT's encodes the images too
    assert "value_head" not in abstract.state.trainable


@pytest.mark.parametrize(
    ("flags", "phases"),
    [
        (["--config.algorithm=lsft"], ["update"]),
        (["--config.algorithm=lsft", "--config.lsft.train=both"], ["update"]),
        (["--config.algorithm=ldistill"], ["rollout", "update"]),
        (["--config.algorithm=lrloo"], ["rollout", "prepare", "update"]),
        (["--config.algorithm=ldpo"], ["update"]),
        (["--config.lppo.anchor_coef=0.5"], ["rollout", "prepare", "update"]),
    ],
    ids=["lsft", "projector", "ldistill", "lrloo", "ldpo", "anchor"],
)
def test_every_algorithm_is_planned(flags, phases, capsys):
    code, rows, _ = planned(LLAVA, "--topology=h100:8", *flags, capsys=capsys)
    assert code == 0 and list(rows)[3 : 3 + len(phases)] == phases
