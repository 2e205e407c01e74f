"""The programs that XLA makes for an H200 from two-layer models of LLaVA-1.5-7B's widths; no GPU is needed."""

import json
import os
import subprocess
import sys

import pytest

from icet_jax.parallel import gpu_targets

pytestmark = pytest.mark.skipif(not gpu_targets.installed(), reason="needs the compiler for GPUs (the plan-gpu extra)")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """{phase: what its program holds}, of a run that trains adapters."""
    removed = ("XLA_FLAGS", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    command = [sys.executable, "-m", "tests.planning.gpu_programs", str(tmp_path_factory.mktemp("checkpoint"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_products_are_those_that_were_counted_and_nothing_is_computed_twice(programs):
    for phase, program in programs.items():
        assert 0.97 < program["flops"] / program["work"] < 1.03, phase


def test_prompts_are_attended_to_by_the_fused_kernel(programs):
    for phase in ("sweep: fill", "rollout", "prepare", "update"):
        assert programs[phase]["attention"] > 0, phase
    assert programs["update"]["attention"] > programs["prepare"]["attention"]  # forward again, and backward


def test_the_slots_are_decoded_in_place(programs):
    for phase in ("sweep: fill", "sweep: decode"):
        assert programs[phase]["aliased"] >= programs[phase]["cache"] > 0, phase
    assert programs["sweep: decode"]["temporaries"] < programs["sweep: decode"]["cache"]


def test_a_decoding_step_launches_few_kernels_and_moves_no_weights(programs):
    """Projections are joined, and adapters are rows of them: without that there were 85 kernels a step for two layers,
    and two joins of 97 MiB of weights in each."""
    for phase, most in (("sweep: decode", 62), ("rollout", 66)):
        assert programs[phase]["step_kernels"] <= most, phase
        assert programs[phase]["rearranged"] == [], phase


def test_the_update_pads_and_rotates_nothing_in_every_layer(programs):
    """What is left are the slices of the stacked weights, and what the scan over layers stacks for the way back."""
    left = [name.split()[0].split(".")[0] for name in programs["update"]["rearranged"]]
    assert not [name for name in left if "pad" in name or "gather" in name or "concatenate" in name]
    assert len(left) <= 26
    assert programs["update"]["temporaries"] < 1200 * 2**20  # 1,555 MiB where base and adapter were stored separately
