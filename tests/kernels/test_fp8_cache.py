"""Attention over keys and values in fp8: what is stored, and what is computed of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from helpers.attention import prefill
from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import (
    BF16,
    FP16,
    FP32,
    DecodeBatch,
    PagedBatch,
    Sizes,
    decode_batch,
    interpreted,
    on_cpu,
    paged_batch,
    relative_error,
)
from nanovllm.kernels.decode_attention import paged_decode
from nanovllm.kernels.decode_plan import DecodePlan, decode_tile, plan_decode
from nanovllm.kernels.paged_cache import as_stored
from nanovllm.kernels.prefill_attention import paged_prefill
from nanovllm.kernels.rope_store import qk_norm_rope_store
from nanovllm.layers.paged_attention import (
    decode_attention,
    in_fp8,
    norm_rope_store,
    prefill_attention,
)

pytestmark = pytest.mark.usefixtures("poison")
FP8 = torch.float8_e4m3fn
# The widened values are multiplied in float16, or in float32.
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}


@triton.jit
def as_stored_kernel(x_ptr, scale_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    tl.store(out_ptr + i, as_stored(tl.load(x_ptr + i), scale, out_ptr.dtype.element_ty))


def check_as_stored(device: str) -> None:
    """All numbers of e4m3, those half way between two, their neighbours, and what is too large.
    Times the scale, too: there a product with 1 / scale would fall on the other side of a tie."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, torch.tensor([449.0, 1e6, 3e38, 1e-30, 2.0**-10])])
    x = torch.cat([x, -x, x * (1 + 2.0**-20), x * (1 - 2.0**-20)])
    x = torch.nn.functional.pad(x, (0, 4096 - len(x))).to(device)
    for number in (1.0, 0.25, 0.037, 0.011, 3.0):
        scale = torch.tensor([number], device=device)
        for values in (x, x * scale):
            out = torch.empty(len(x), dtype=FP8, device=device)
            as_stored_kernel[(1,)](values, scale, out, len(x))
            expected = in_fp8(values[:, None, None], scale).flatten()
            assert torch.equal(out.float().cpu(), expected.float().cpu())
    assert out.float().abs().max() == 448


@interpreted
def test_values_are_rounded_to_the_nearest_and_saturate() -> None:
    check_as_stored("cpu")


@pytest.mark.gpu
def test_values_are_rounded_to_the_nearest_and_saturate_gpu() -> None:
    check_as_stored("cuda")


def scales_of(num_kv_heads: int, device: str) -> torch.Tensor:
    """Powers of two, as they follow from weights, and others, as checkpoints have them."""
    scales = torch.tensor([[0.037, 0.25, 0.3], [0.125, 0.021, 0.5]]).repeat(1, num_kv_heads)
    return scales[:, :num_kv_heads].contiguous().to(device)


def in_fp8_cache(batch: PagedBatch, scales: torch.Tensor) -> PagedBatch:
    """The same batch with its keys and values in fp8; what nobody has written stays NaN."""
    caches = []
    for cache, own in zip((batch.k_cache, batch.v_cache), scales):
        stored = in_fp8(cache.flatten(0, 1), own).view(torch.uint8)
        stored[cache.flatten(0, 1).isnan()] = 0x7F
        caches.append(stored.view(FP8).view_as(cache))
    return replace(batch, k_cache=caches[0], v_cache=caches[1])


def widened(batch: PagedBatch, scales: torch.Tensor) -> PagedBatch:
    """For float64 answers: what the cache holds, times its scales."""
    caches = [
        cache.float().double() * own[:, None].double()
        for cache, own in zip((batch.k_cache, batch.v_cache), scales)
    ]
    return replace(batch, k_cache=caches[0], v_cache=caches[1])


def check_prefill(function, sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> None:
    plain = paged_batch([1, 17, 40, 64], [1, 40, 40, 200], sizes, dtype, device)
    scales = scales_of(sizes[2], device)
    batch = in_fp8_cache(plain, scales)
    out = prefill(function, batch, kv_scales=scales)
    assert out.dtype == dtype
    assert relative_error(out, widened(batch, scales).expected()) < TOLERANCE[dtype]


def check_decode(
    function, context_lens: list[int], sizes: Sizes, dtype: torch.dtype, device: str = "cpu"
) -> None:
    plain = decode_batch(context_lens, sizes, dtype, device)
    scales = scales_of(sizes[2], device)
    batch = replace(plain, before=in_fp8_cache(plain.before, scales))
    before = batch.before
    if function is decode_attention:
        q = norm_rope_store(*batch.new_token, kv_scales=scales)
        out = decode_attention(
            q, before.k_cache, before.v_cache, before.context_lens, before.block_tables,
            before.scale, scales,
        )  # fmt: skip
    else:
        out = paged_decode(*batch.new_token, plan_of(batch), before.scale, scales)
    slots = batch.slot_mapping[batch.slot_mapping >= 0].long()
    for cache, exact, own in zip(
        (before.k_cache, before.v_cache), (plain.after.k_cache, plain.after.v_cache), scales
    ):
        stored = cache.view(torch.uint8).flatten(0, 1)[slots].view(FP8).float()
        expected = in_fp8(exact.flatten(0, 1)[slots], own).float()
        assert (stored == expected).double().mean() > 0.98, "but for ties"
        torch.testing.assert_close(stored, expected, rtol=0.13, atol=2.0**-9)
    # The new token enters as it is stored, whatever the number of rows.
    expected = replace(widened(before, scales), q=plain.after.q).expected()
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert not out[before.context_lens == 0].any()


def plan_of(batch: DecodeBatch) -> DecodePlan:
    before = batch.before
    real = before.context_lens > 0
    context_lens, block_tables = (
        tensor[real].cpu().numpy() for tensor in (before.context_lens, before.block_tables)
    )
    block_size, _, head_dim = before.k_cache.shape[1:]
    tile = decode_tile(len(batch.qkv), head_dim, in_fp8=True)
    plan = plan_decode(context_lens, block_tables, block_size, tile, 7, len(batch.qkv))
    bounds, chunk_counts, tiles = (torch.from_numpy(np.ascontiguousarray(p)) for p in plan[:3])
    chunk_counts = torch.cat((chunk_counts, torch.zeros(int((~real).sum()), dtype=torch.int32)))
    return DecodePlan(*(piece.to(batch.qkv.device) for piece in (bounds, chunk_counts, tiles)))


SIZES = [(16, 4, 2, 64), (64, 2, 1, 128), (16, 3, 3, 32), (256, 6, 3, 64)]


@interpreted
@on_cpu
@pytest.mark.parametrize("function", [paged_prefill, prefill_attention])
@pytest.mark.parametrize("sizes", SIZES[1::2])
def test_prefill(function, sizes: Sizes, dtype: torch.dtype) -> None:
    check_prefill(function, sizes, dtype)


@interpreted
@on_cpu
@pytest.mark.parametrize("function", [paged_decode, decode_attention])
@pytest.mark.parametrize("context_lens", [[1, 40, 130], [600, 2, 33, 64, 65, 7, 0]])
@pytest.mark.parametrize("sizes", SIZES[::2])
def test_decode(function, context_lens: list[int], sizes: Sizes, dtype: torch.dtype) -> None:
    check_decode(function, context_lens, sizes, dtype)


@interpreted
def test_stored_values_do_not_depend_on_the_kernel_that_stores_them() -> None:
    """The one of prefill, that of many rows, and the fused one of few."""
    sizes, scales = (16, 4, 2, 64), scales_of(2, "cpu")
    found = []
    for function in (qk_norm_rope_store, paged_decode):
        batch = decode_batch([40, 130, 7], sizes, FP32)
        batch = replace(batch, before=in_fp8_cache(batch.before, scales))
        if function is qk_norm_rope_store:
            function(*batch.new_token, kv_scales=scales)
        else:
            function(*batch.new_token, plan_of(batch), batch.before.scale, scales)
        caches = (batch.before.k_cache, batch.before.v_cache)
        found.append([cache.view(torch.uint8).clone() for cache in caches])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


GPU_SIZES = [((64, 16, 8, 128), BF16), ((16, 8, 1, 64), FP16), ((256, 16, 4, 128), BF16)]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
def test_attention_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    check_prefill(paged_prefill, sizes, dtype, "cuda")
    for context_lens in ([1, 40, 3000], [32000, 1, 700, *range(60, 80), 0]):
        check_decode(paged_decode, context_lens, sizes, dtype, "cuda")


FACTS = """
import torch
from helpers.compile_launches import CARDS, launches
from nanovllm.kernels.decode_attention import paged_decode
from nanovllm.kernels.decode_plan import DecodePlan
from nanovllm.kernels.prefill_attention import paged_prefill
from nanovllm.kernels.prefill_plan import PrefillPlan

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

int32, float32, fp8 = torch.int32, torch.float32, torch.float8_e4m3fn
cache, scales = empty(100, 64, 8, 128, dtype=fp8), empty(2, 8, dtype=float32)
for card in CARDS:
    if card.capability < (8, 9):
        continue
    found = launches(
        paged_prefill, empty(300, 16, 128), cache, cache,
        PrefillPlan(empty(8, 5, dtype=int32), 64, 128, 4096), empty(4, 64, dtype=int32), 0.088,
        scales, card=card,
    )
    for rows in (1, 64):
        plan = DecodePlan(
            empty(33, dtype=int32), empty(rows, dtype=int32), empty(400, 2, dtype=int32)
        )
        found += launches(
            paged_decode, empty(rows, 32 * 128), empty(128), empty(128), 1e-6,
            empty(4096, 128, dtype=float32), empty(rows, dtype=int32), cache, cache,
            empty(rows, dtype=int32), plan, 0.088, scales, card=card,
        )
    bad = [(launch.name, launch.spills) for launch in found if launch.spills or not launch.fits]
    print(card.name, len(found), bad)
"""


@pytest.mark.slow
def test_they_compile_for_all_cards_with_fp8(tmp_path: Path) -> None:
    lines = run_compiler(FACTS, tmp_path).splitlines()
    assert len(lines) >= 3 and all(line.endswith(" 6 []") for line in lines), lines


WIDENING = """
import torch
from helpers.compile_launches import launches
from nanovllm.kernels.decode_attention import paged_decode
from nanovllm.kernels.decode_plan import DecodePlan

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

int32, float32, fp8 = torch.int32, torch.float32, torch.float8_e4m3fn
cache, scales = empty(100, 16, 1, 64, dtype=fp8), empty(2, 1, dtype=float32)
plan = DecodePlan(empty(33, dtype=int32), empty(8, dtype=int32), empty(400, 2, dtype=int32))
found = launches(
    paged_decode, empty(8, 4 * 64), None, None, 1e-6, empty(4096, 64, dtype=float32),
    empty(8, dtype=int32), cache, cache, empty(8, dtype=int32), plan, 0.088, scales,
)
[decode] = [launch for launch in found if launch.name == "_decode_kernel"]
print(decode.compiled.asm["ptx"].count("cvt.rn.f16x2.e4m3x2"))
"""


@interpreted
def test_words_of_values_compile(tmp_path: Path) -> None:
    """What the interpreter does not read, in whatever version of Triton is installed."""
    assert int(run_compiler(WIDENING, tmp_path)) >= 4
