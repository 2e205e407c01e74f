"""Programs compiled for GPUs are read: kernels, operations, bytes and loops."""

import jax
import jax.numpy as jnp
import pytest

from icet_jax.parallel.hlo import HloProgram, dimensions, shape_bytes
from icet_jax.parallel.topology import CHIPS
from icet_jax.planning.kernels import LAUNCH_SECONDS, REACHED_BANDWIDTH, REACHED_FLOPS, GpuProgram

PROGRAM = """HloModule jit_step, is_scheduled=true

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] constant(7)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%layer_product (p0: bf16[8,16], p1: bf16[4,16,32], p2: s32[]) -> bf16[8,32] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[4,16,32]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,16,32]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %kernel = bf16[16,32]{1,0} bitcast(%slice)
  ROOT %dot = bf16[8,32]{1,0} dot(%p0, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%write_column (c0: bf16[8,64,16], c1: bf16[8,1,16], c2: s32[]) -> bf16[8,64,16] {
  %c0 = bf16[8,64,16]{2,1,0} parameter(0)
  %c1 = bf16[8,1,16]{2,1,0} parameter(1)
  %c2 = s32[] parameter(2)
  ROOT %update = bf16[8,64,16]{2,1,0} dynamic-update-slice(%c0, %c1, %c2)
}

%joined (j0: bf16[16,32], j1: bf16[16,32]) -> bf16[16,64] {
  %j0 = bf16[16,32]{1,0} parameter(0)
  %j1 = bf16[16,32]{1,0} parameter(1)
  ROOT %concat = bf16[16,64]{1,0} concatenate(%j0, %j1), dimensions={1}
}

%command_buffer (q0: bf16[8,16], q1: bf16[4,16,32], q2: s32[], q3: bf16[8,64,16], q4: bf16[8,1,16]) -> bf16[8,32] {
  %q0 = bf16[8,16]{1,0} parameter(0)
  %q1 = bf16[4,16,32]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %q3 = bf16[8,64,16]{2,1,0} parameter(3)
  %q4 = bf16[8,1,16]{2,1,0} parameter(4)
  %write = bf16[8,64,16]{2,1,0} fusion(%q3, %q4, %q2), kind=kLoop, calls=%write_column
  ROOT %product = bf16[8,32]{1,0} fusion(%q0, %q1, %q2), kind=kCustom, calls=%layer_product, backend_config={"k":"(1)"}
}

%body (t: (s32[], bf16[8,16], bf16[4,16,32], bf16[8,64,16], bf16[8,1,16])) -> (s32[], bf16[8,16]) {
  %t = (s32[], bf16[8,16]{1,0}, /*index=2*/bf16[4,16,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%t), index=1
  %w = bf16[4,16,32]{2,1,0} get-tuple-element(%t), index=2
  %k = bf16[8,64,16]{2,1,0} get-tuple-element(%t), index=3
  %n = bf16[8,1,16]{2,1,0} get-tuple-element(%t), index=4
  %called = bf16[8,32]{1,0} call(%x, %w, %i, %k, %n), to_apply=%command_buffer
  %left = bf16[16,32]{1,0} constant({...})
  %both = bf16[16,64]{1,0} fusion(%left, %left), kind=kInput, calls=%joined
  %gemm = (bf16[8,64]{1,0}, s8[4194304]{0}) custom-call(%x, %both), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}, metadata={op_name="jit(step)/while/dot"}
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%i, %x)
}

%ending (t2: (s32[], bf16[8,16])) -> pred[] {
  %t2 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i2 = s32[] get-tuple-element(%t2), index=0
  ROOT %go = pred[] fusion(%i2), kind=kLoop, calls=%less
}

ENTRY %main (q: bf16[2,256,4,64], k: bf16[2,256,4,64]) -> bf16[2,256,4,64] {
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(0)
  %kk = bf16[2,256,4,64]{3,2,1,0} parameter(1)
  %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%ending, body=%body
  ROOT %fmha = (bf16[2,256,4,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %kk, %kk), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type":"CAUSAL"}
}
"""  # noqa: E501
PRODUCT, CUBLAS = 2 * 8 * 16 * 32, 2 * 8 * 16 * 64
ATTENTION = 2 * 2 * (2 * 256 * 4 * 64) * 256 // 2


@pytest.fixture(scope="module")
def program():
    return GpuProgram(PROGRAM)


def test_shapes():
    assert shape_bytes("(bf16[8,64]{1,0}, /*index=1*/s8[10]{0}, pred[3]{0}, f8e4m3fn[4]{0}, f32[])") == 1024 + 17 + 4
    assert dimensions("(bf16[8,64]{1,0}, s8[10]{0})") == (8, 64) and dimensions("s32[]") == ()


def test_a_loop_runs_as_often_as_its_condition_or_the_compiler_says(program):
    (loop,) = program.loops()
    assert program.iterations(loop) == 7
    known = GpuProgram(PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'))
    assert known.iterations(known.loops()[0]) == 3
    unknown = GpuProgram(PROGRAM.replace("constant(7)", "parameter(1)"))
    assert unknown.iterations(unknown.loops()[0]) is None
    assert unknown.cost(CHIPS["h200"]).kernels == 5


def test_kernels_are_counted_with_their_operations_and_bytes(program):
    kernels = {kernel.instruction.name: kernel for kernel in program.kernels}
    assert {name: (kernel.kind, kernel.flops, kernel.runs) for name, kernel in kernels.items()} == {
        "write": ("rearrangement", 0, 7), "product": ("product", PRODUCT, 7), "both": ("rearrangement", 0, 7),
        "gemm": ("product", CUBLAS, 7), "fmha": ("attention", ATTENTION, 1),
    }  # fmt: skip
    # Of the stack of kernels one slice is read; of the cache nothing, and one column is written.
    assert kernels["product"].bytes == 8 * 16 * 2 + 16 * 32 * 2 + 4 + 8 * 32 * 2
    assert kernels["write"].bytes == 2 * 8 * 16 * 2 + 4
    assert kernels["gemm"].instruction.source == "jit(step)/while/dot"


def test_cost_is_the_longer_of_two_times_for_each_kernel(program):
    chip = CHIPS["h200"]
    cost = program.cost(chip)
    assert (cost.kernels, cost.step_kernels) == (7 * 4 + 1, 4)
    assert cost.flops == 7 * (PRODUCT + CUBLAS) + ATTENTION
    assert cost.bytes == sum(kernel.runs * kernel.bytes for kernel in program.kernels)
    fmha = next(kernel for kernel in program.kernels if kernel.kind == "attention")
    by_bytes = fmha.bytes / (REACHED_BANDWIDTH * chip.bandwidth)
    assert by_bytes > ATTENTION / (REACHED_FLOPS * chip.flops)
    assert fmha.seconds(chip) == pytest.approx(by_bytes + LAUNCH_SECONDS)
    assert cost.seconds == pytest.approx(sum(kernel.runs * kernel.seconds(chip) for kernel in program.kernels))


def test_what_a_loop_only_rearranges_is_found_by_what_it_writes(program):
    (loop,) = program.loops()
    written = {k.instruction.name: k.written for k in program.loop_kernels(loop) if k.kind == "rearrangement"}
    assert written == {"write": 8 * 16 * 2, "both": 16 * 64 * 2}


def test_a_program_compiled_here_is_read():
    def steps(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(steps).lower(jnp.ones((4, 8)), jnp.ones((3, 8, 8))).compile().as_text()
    program = GpuProgram(text)
    assert [program.iterations(loop) for loop in program.loops()] == [3]
    assert sum(kernel.runs * kernel.flops for kernel in program.kernels) == 3 * 2 * 4 * 8 * 8


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        HloProgram("HloModule nothing")
