"""Prefill attention for Hopper: emulated on a CPU, compiled, and on a GPU, against float64."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helpers.attention import prefill, prefill_plan
from helpers.compile_launches import run_compiler
from helpers.gluon_on_cpu import SCHEDULES, emulated
from helpers.kernel_inputs import (
    BF16,
    FP16,
    FP32,
    TOLERANCE,
    PagedBatch,
    Sizes,
    paged_batch,
    relative_error,
)
from nanovllm.kernels import prefill_attention
from nanovllm.kernels.launch import Gpu
from nanovllm.kernels.prefill_attention import paged_prefill, suits_hopper
from nanovllm.kernels.prefill_plan import SHORT_TILE, TILE, PrefillPlan

pytestmark = pytest.mark.usefixtures("poison")
FILE = Path(prefill_attention.__file__).with_name("prefill_hopper.py")
HOPPER = Gpu((9, 0), 227 * 1024, 228 * 1024, 132)

# Emulated

COUNTS, CONTEXTS = [100, 37, 64, 1, 130], [100, 165, 64, 70, 400]
NO_BLOCK, MORE_QUERIES, MORE_TILES = -1000, 5, 4
NARROW, WIDE = 1024, 1025  # contexts of a step: the longest with narrow tiles of keys, and one more
SIZES = [
    ((64, 4, 2, 128), BF16),
    ((128, 8, 2, 128), FP16),
    ((256, 4, 1, 128), BF16),
    ((192, 4, 2, 64), BF16),
]


def batch_of(sizes: Sizes, dtype: torch.dtype = BF16) -> PagedBatch:
    """The queries after the last row's are NaN, as is what was never written to the cache."""
    batch = paged_batch(COUNTS, CONTEXTS, sizes, dtype)
    for table, context_len in zip(batch.block_tables, CONTEXTS):
        table[-(-context_len // sizes[0]) :] = NO_BLOCK
    others = batch.q.new_full((MORE_QUERIES, *batch.q.shape[1:]), float("nan"))
    return replace(batch, q=torch.cat((batch.q, others)))


def attend(
    kernel: ModuleType, batch: PagedBatch, max_context_len: int, programs: int
) -> torch.Tensor:
    kernel.gpu_with = lambda q: SimpleNamespace(num_sms=programs)
    plan = prefill_plan(batch)
    empty = plan.tiles.new_zeros(MORE_TILES, plan.tiles.shape[1])
    tiles = torch.cat((plan.tiles, empty))
    plan = plan._replace(tiles=tiles, max_context_len=max_context_len)
    return kernel.prefill_on_hopper(
        batch.q, batch.k_cache, batch.v_cache, plan, batch.block_tables, batch.scale
    )


def error_of(out: torch.Tensor, batch: PagedBatch) -> float:
    expected = replace(batch, q=batch.q[:-MORE_QUERIES]).expected()
    return relative_error(out[:-MORE_QUERIES], expected)


@pytest.mark.parametrize("max_context_len", [NARROW, WIDE])
@pytest.mark.parametrize(("sizes", "dtype"), SIZES)
def test_every_query_attends_to_its_sequence_up_to_itself(
    sizes: Sizes, dtype: torch.dtype, max_context_len: int
) -> None:
    batch, kernel = batch_of(sizes, dtype), emulated(FILE)
    outs = [attend(kernel, batch, max_context_len, programs) for programs in (1, 3, 7)]
    assert outs[0].dtype == dtype
    assert error_of(outs[0], batch) < TOLERANCE[dtype]
    assert outs[0][-MORE_QUERIES:].isnan().all()  # not written, or `poison` would be gone
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=0, equal_nan=True)


def test_short_rows() -> None:
    """Whose tiles have few queries, in a step that would be another kernel's."""
    batch = paged_batch([1, SHORT_TILE, 3], [129, 64, 3], (64, 2, 1, 128), BF16)
    assert prefill_plan(batch).tile == SHORT_TILE
    out = prefill(emulated(FILE).prefill_on_hopper, batch)
    assert relative_error(out, batch.expected()) < TOLERANCE[BF16]


FAULTS = {
    "queries are read early": {"mbarrier.wait(q_full.index(buf), used // 2 & 1)": ""},
    "queries are overwritten": {"mbarrier.wait(q_empty.index(buf), (used // 2 & 1) ^ 1)": ""},
    "queries are released early": {
        "            out = q.load(wide)\n": "",
        "_release(q_empty.index(buf))": "_release(q_empty.index(buf)); out = q.load(wide)",
    },
    "keys are read early": {"mbarrier.wait(k_full.index(stage), phase)": ""},
    "keys are overwritten": {"mbarrier.wait(k_empty.index(stage), phase)": ""},
    "keys are released early": {
        "scores = warpgroup_mma_wait(0, deps=(token,))": "_release(k_empty.index(stage))",
        "_release(k_empty.index(stage))\n            scores = _visible(": (
            "scores = warpgroup_mma_wait(0, deps=(token,)); scores = _visible("
        ),
    },
    "keys are not released": {"_release(k_empty.index(stage))": ""},
    "values are read early": {"mbarrier.wait(v_full.index(last_stage), last_phase)": ""},
    "values of the first tile are read early": {"mbarrier.wait(v_full.index(stage), phase)": ""},
    "values are overwritten": {"mbarrier.wait(v_empty.index(stage), phase)": ""},
    "values are released early": {
        "acc_token = warpgroup_mma(": "_release(v_empty.index(last_stage)); "
        "acc_token = warpgroup_mma(",
        "                _release(v_empty.index(last_stage))\n": "",
    },
    "values are of the next stage": {"v_bufs.index(last_stage), acc": "v_bufs.index(stage), acc"},
    "values are not released": {"_release(v_empty.index(last_stage))": ""},
    "one group releases for both": {
        "mbarrier.init(v_empty.index(i), count=2)": "mbarrier.init(v_empty.index(i), count=1)"
    },
    "values are NaN": {"if start + BN > context:": "if False:"},
    "no keys are hidden but the last": {"if start + BN > position + 1:": "if False:"},
    "a row that sees none of the last keys": {", -1.0e30)": ', float("-inf"))'},
    "a block past the table": {
        "gl.minimum((start + 64) // BLOCK_SIZE, last_block)": "(start + 64) // BLOCK_SIZE"
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str) -> None:
    """Or the emulation would say nothing."""
    batch = batch_of((64, 4, 2, 128))
    kernel = emulated(FILE, FAULTS[fault])
    try:
        error = error_of(attend(kernel, batch, WIDE, len(SCHEDULES)), batch)
    except (RuntimeError, AssertionError):  # a wait without an end, or too many arrivals
        return
    assert not error < TOLERANCE[BF16]


# Compiled

FACTS = """
import torch
from helpers.compile_launches import H100, simulated, stand_in
from nanovllm.kernels.prefill_attention import paged_prefill
from nanovllm.kernels.prefill_plan import PrefillPlan

def empty(*shape, dtype=torch.int32):
    return stand_in(torch.empty(shape, dtype=dtype, device="meta"))

with simulated(H100) as found:
    for dtype, context_len, head_dim in (
        (torch.bfloat16, 32768, 128), (torch.float16, 1024, 128), (torch.bfloat16, 32768, 64),
    ):
        # Lengths that are odd, 1, and multiples of 16: all are the same kernel.
        for tokens, blocks, tiles, width in (
            (3001, 99, 47, 31), (4096, 70000, 64, 16), (2048, 9, 32, 1)
        ):
            q = empty(tokens, 16, head_dim, dtype=dtype)
            cache = empty(blocks, 64, 8, head_dim, dtype=dtype)
            plan = PrefillPlan(empty(tiles, 5), 64, 1000, context_len)
            paged_prefill(q, cache, cache, plan, empty(4, width), 0.088)
for launch in found:
    print(launch.name, launch.grid, launch.fits, launch.spills)
print(len(found), len({id(launch.compiled) for launch in found}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not prefill_attention._HAS_GLUON, reason="another version of Triton")
def test_it_compiles_once_for_each_width_and_fits(tmp_path: Path) -> None:
    *launches, counts = run_compiler(FACTS, tmp_path).splitlines()
    assert set(launches) == {"_prefill_on_hopper_kernel (132,) True 0"}
    assert counts == "9 3"


# The choice


def test_it_is_chosen_for_long_prompts_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    def suits(
        heads: int = 16, kv_heads: int = 8, head_dim: int = 128, block_size: int = 64,
        tokens: int = 2048, longest: int = 256, dtype: torch.dtype = BF16,
        cache: torch.dtype | None = None, gpu: Gpu | None = HOPPER,
    ) -> bool:  # fmt: skip
        cache_shape = 4, block_size, kv_heads, head_dim
        k_cache = torch.empty(cache_shape, dtype=cache or dtype, device="meta")
        plan = PrefillPlan(None, TILE, longest, 40000)
        return suits_hopper(torch.Size((tokens, heads, head_dim)), dtype, k_cache, plan, gpu)

    monkeypatch.setattr(prefill_attention, "_HAS_GLUON", True)
    assert suits() and suits(dtype=FP16) and suits(heads=8, kv_heads=1, block_size=192)
    assert not suits(gpu=None)
    for capability in ((8, 9), (10, 0), (12, 0)):
        assert not suits(gpu=HOPPER._replace(capability=capability))
    assert not suits(dtype=FP32)
    assert not suits(cache=torch.float8_e4m3fn)
    assert suits(head_dim=64) and not suits(head_dim=96)
    assert not suits(heads=8) and not suits(heads=24)  # 1 and 3 share keys: no pairs
    assert not suits(block_size=16) and not suits(block_size=96)
    assert not suits(tokens=2047)
    assert not suits(longest=255)
    monkeypatch.setattr(prefill_attention, "_HAS_GLUON", False)
    assert not suits()


# On a GPU

has_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not has_hopper, reason="needs a Hopper GPU")
GPU_SIZES = [
    ((64, 16, 8, 128), BF16),
    ((64, 32, 8, 128), FP16),
    ((128, 32, 8, 128), BF16),
    ((256, 8, 1, 128), BF16),
    ((64, 32, 8, 64), BF16),
]


def check_each_time(batch: PagedBatch, expected: torch.Tensor) -> None:
    """A race would show in one of many times."""
    from nanovllm.kernels.prefill_hopper import prefill_on_hopper

    out = prefill(prefill_on_hopper, batch)
    assert relative_error(out, expected) < TOLERANCE[batch.q.dtype]
    assert all(torch.equal(prefill(paged_prefill, batch), out) for _ in range(20))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
@pytest.mark.parametrize("is_narrow", [False, True])
def test_ragged_rows_gpu(sizes: Sizes, dtype: torch.dtype, is_narrow: bool) -> None:
    rows = [(1, 0), (2, 700), (16, 15), (64, 0), (33, 31), (128, 0), (129, 127), (1, 255)]
    if is_narrow:
        rows += [(700, 0), (1000, 24), (300, 724)]
    else:
        rows += [(1, 32767), (700, 0), (1000, 1049), (1500, 500), (50, 4000), (300, 32468)]
    counts, contexts = [new for new, _ in rows], [sum(row) for row in rows]
    batch = paged_batch(counts, contexts, sizes, dtype, "cuda")
    assert suits_hopper(batch.q.shape, dtype, batch.k_cache, prefill_plan(batch), HOPPER)
    check_each_time(batch, batch.expected())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("length", [300, 1024, 4096])
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
def test_full_steps_gpu(
    sizes: Sizes, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All multiprocessors are busy, and agree with the kernel of other GPUs."""
    rows = 16384 // length
    batch = paged_batch([length] * rows, [length] * rows, sizes, dtype, "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(prefill_attention, "suits_hopper", lambda *_: False)
        expected = prefill(paged_prefill, batch)
    check_each_time(batch, expected)
