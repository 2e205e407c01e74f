"""Topologies by name, and what devices exchange."""

import importlib.util

import jax
import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.parallel import gpu_targets, topology
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("text", "count"), [("v5e:8x8", 64), ("v5p:4x4x4", 64), ("v4:2x2x2", 8), ("h100:8", 8), ("cpu:1", 1)]
)
def test_a_topology_is_a_number_of_chips(text, count):
    found = topology.parse(text)
    assert (found.count, found.chip.name) == (count, text.split(":")[0])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:2x2", "unknown chip 'v9'; known are v4, v5e"),
        ("v5e", "'' is not a shape of v5e chips; type for example v5e:4x4"),
        ("v5e:16", "'16' is not a shape of v5e chips"),
        ("v5e:0x4", "'0x4' is not a shape"),
        ("h100:2x4", "type for example h100:8"),
    ],
)
def test_what_is_no_topology_is_named(text, says):
    with pytest.raises(UserError) as caught:
        topology.parse(text)
    assert says in str(caught.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the `tpu` extra: pip install"):
        topology.parse("v5e:4x4").devices()


def test_devices_of_what_is_here_and_of_what_is_not(monkeypatch):
    monkeypatch.setattr(gpu_targets, "PACKAGES", ("nobody.nothing",))
    assert topology.parse("h100:8").devices() is None
    assert topology.parse("cpu:1").devices() == jax.devices("cpu")[:1]
    with pytest.raises(UserError, match="device_count=4096"):
        topology.parse("cpu:4096").devices()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")
def test_every_tpu_has_one_device_per_chip_and_bad_shapes_are_one_line():
    for text in ("v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:4x4"):
        assert len(topology.parse(text).devices()) == topology.parse(text).count
    with pytest.raises(UserError, match="v5e:3x3: libtpu does not know it"):
        topology.parse("v5e:3x3").devices()


def test_a_gpu_is_described_by_its_own_numbers():
    for name, target in gpu_targets.TARGETS.items():
        text = gpu_targets.target_config(target)
        assert f"major: {target.capability[0]} minor: 0" in text and text.count(target.name) == 2
        assert text.count("{") == text.count("}") and str(target.memory) in text
        assert topology.chip_of(target.name) is topology.CHIPS[name]
    assert topology.CHIPS["a100"].compute_capability == 8.0 and topology.CHIPS["v5e"].compute_capability == 0
    hopper = gpu_targets.target_config(gpu_targets.TARGETS["h200"])
    assert "key: 16 value { clock_rate_ghz: 1.8295201 units_per_core: 4 ops_per_clock: 512 }" in hopper


@pytest.mark.skipif(not gpu_targets.installed(), reason="needs the compiler for GPUs (the plan-gpu extra)")
@pytest.mark.parametrize("name", gpu_targets.TARGETS)
def test_gpus_that_are_not_here_have_devices(name):
    devices = topology.parse(f"{name}:2").devices()
    assert len(devices) == 2 and topology.chip_of(devices[0].device_kind) is topology.CHIPS[name]


LOOP = """HloModule step
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  %done = u32[] convert(%i)
  %lt = pred[] compare(%i, %n), direction=LT
  %ad = u32[] all-reduce(%done), channel_id=9, to_apply=%both
  ROOT %go = pred[] and(%lt, %ad)
}
%both (l: u32[], r: u32[]) -> u32[] {
  ROOT %zero = u32[] constant(0)
}
%fused (q: bf16[2,4]) -> bf16[8,4] {
  %q = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, dimensions={0}
}
%again (q2: bf16[2,4]) -> bf16[8,4] {
  %q2 = bf16[2,4]{1,0} parameter(0)
  ROOT %ag2 = bf16[8,4]{1,0} all-gather(%q2), channel_id=1, dimensions={0}
}
%body (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], /*index=1*/f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %h = bf16[2,4]{1,0} convert(%x)
  %f = bf16[8,4]{1,0} fusion(%h), kind=kLoop, calls=%fused
  %g = bf16[8,4]{1,0} fusion(%h), kind=kLoop, calls=%again
  %k = bf16[8,4]{1,0} custom-call(%g), custom_call_target="kernel", frontend_attributes={kernel_metadata={
"block": 512
}}, metadata={op_name="kernel"}
  %ar = (f32[8,4]{1,0:T(8,128)S(1)}, bf16[2,4]{1,0}) all-reduce(%x, %h), channel_id=2, to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %x)
}
ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %cp = (f32[8,4]{1,0}, f32[8,4]{1,0}) collective-permute-start(%a), channel_id=3
  %w = (s32[], f32[8,4]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    gather, reduce, permute = 8 * 4 * 2, 2 * (8 * 4 * 4 + 2 * 4 * 2 + 4), 8 * 4 * 4
    assert moved_bytes(LOOP) == 5 * (gather + reduce) + permute


def test_a_loop_of_unknown_length_is_not_guessed():
    assert moved_bytes(LOOP.replace("constant(5)", "parameter(1)")) is None
    assert moved_bytes("HloModule nothing") is None


def test_a_program_of_one_device_exchanges_nothing():
    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ y, x)

    assert moved_bytes(jax.jit(loop).lower(jax.numpy.ones((4, 4))).compile().as_text()) == 0


class Chip:
    """What `jax.make_mesh` asks a TPU's chip."""

    platform, device_kind, core_on_chip, slice_index, process_index = "tpu", "TPU v5", 0, 0, 0

    def __init__(self, place: tuple[int, int, int]):
        self.coords, self.id = list(place), 16 * place[0] + 4 * place[1] + place[2]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 16}, {"data": 64}])
def test_a_mesh_may_split_an_axis_of_the_torus(sizes):
    chips = [Chip(place) for place in np.ndindex(4, 4, 4)]
    mesh = make_mesh(**{"data": -1, **sizes}, devices=chips)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(64))
    assert mesh.shape == {"data": 64, "fsdp": 1, "tensor": 1} | sizes | {"data": mesh.shape["data"]}
    for group in mesh.devices.reshape(-1, mesh.shape["fsdp"] * mesh.shape["tensor"]):
        spans = np.ptp([chip.coords for chip in group], axis=0) + 1
        assert np.prod(spans) == len(group)  # those that exchange weights are a block of neighbours
