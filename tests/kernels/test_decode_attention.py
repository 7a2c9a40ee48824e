"""Decode attention over the paged cache: the kernel and its twin in torch against float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.attention import GPU_SIZES, prefill
from helpers.kernel_inputs import (
    BF16,
    FP32,
    TOLERANCE,
    DecodeBatch,
    Sizes,
    decode_batch,
    interpreted,
    on_cpu_in_fp16,
    paged_batch,
    relative_error,
)
from nanovllm.kernels import decode_attention as decode_attention_module
from nanovllm.kernels.decode_attention import paged_decode
from nanovllm.kernels.decode_plan import (
    FUSED_ROWS,
    MANY_ROWS,
    DecodePlan,
    decode_tile,
    plan_decode,
)
from nanovllm.kernels.prefill_attention import paged_prefill
from nanovllm.layers.paged_attention import decode_attention, norm_rope_store

pytestmark = pytest.mark.usefixtures("poison")


def decode(function, batch: DecodeBatch, num_ranges: int = 7) -> torch.Tensor:
    before = batch.before
    if function is decode_attention:
        q = norm_rope_store(*batch.new_token)
        return decode_attention(
            q, before.k_cache, before.v_cache, before.context_lens, before.block_tables,
            before.scale,
        )  # fmt: skip
    real = before.context_lens > 0
    context_lens, block_tables = (
        tensor[real].cpu().numpy() for tensor in (before.context_lens, before.block_tables)
    )
    block_size, _, head_dim = before.k_cache.shape[1:]
    tile = decode_tile(len(batch.qkv), head_dim, in_fp8=False)
    plan = plan_decode(context_lens, block_tables, block_size, tile, num_ranges, len(batch.qkv))
    bounds, chunk_counts, tiles = (
        torch.from_numpy(piece).to(batch.qkv.device) for piece in plan[:3]
    )
    padding = torch.zeros_like(before.context_lens[~real])
    plan = DecodePlan(bounds, torch.cat((chunk_counts, padding)), tiles)
    return paged_decode(*batch.new_token, plan, before.scale)


def check_decode(
    function,
    context_lens: list[int],
    sizes: Sizes,
    dtype: torch.dtype,
    device: str = "cpu",
    qk_norm: bool = True,
) -> None:
    batch = decode_batch(context_lens, sizes, dtype, device, qk_norm=qk_norm)
    caches_before = [batch.before.k_cache.clone(), batch.before.v_cache.clone()]
    out = decode(function, batch)
    assert out.dtype == dtype
    assert relative_error(out, batch.after.expected()) < TOLERANCE[dtype]
    assert not out[batch.before.context_lens == 0].any()
    slots = batch.slot_mapping[batch.slot_mapping >= 0].long()
    for cache, before, after in zip(
        (batch.before.k_cache, batch.before.v_cache),
        caches_before,
        (batch.after.k_cache, batch.after.v_cache),
    ):
        stored, expected = cache.flatten(0, 1)[slots], after.flatten(0, 1)[slots]
        assert relative_error(stored, expected) < TOLERANCE[dtype]
        cache.flatten(0, 1)[slots] = float("nan")  # as before: nothing else was written
        assert torch.equal(cache.nan_to_num(), before.nan_to_num())


DECODES = [
    ([1, 2, 15, 16, 17, 33, 0], (16, 2, 2, 32)),
    ([129, 127, 128, 514, 513, 0, 0], (48, 4, 2, 64)),
    ([1, 63, 64, 65, 66, 700], (64, 4, 1, 96)),
    ([255, 256, 257, 512, 0], (256, 8, 1, 128)),
    ([600, 0], (16, 17, 1, 32)),
    ([70, 33, 32, 0], (64, 2, 1, 256)),
    ([1, 600, 64, 65], (16, 4, 2, 64)),
    ([513, 1, 2, 0, 0, 0], (64, 8, 8, 32)),
    ([4200, 1, 9, 2, 3], (64, 2, 1, 32)),  # 17 chunks, and single ones
    ([513, 1, 64, 1200] + [20] * MANY_ROWS + [0], (64, 2, 1, 32)),
    ([1100, 1] + [3] * 2 * MANY_ROWS, (64, 1, 1, 32)),
]


@interpreted
@on_cpu_in_fp16
@pytest.mark.parametrize("function", [paged_decode, decode_attention])
@pytest.mark.parametrize(("context_lens", "sizes"), DECODES)
def test_paged_decode(function, context_lens, sizes: Sizes, dtype: torch.dtype) -> None:
    check_decode(function, context_lens, sizes, dtype)


@interpreted
@pytest.mark.parametrize("function", [paged_decode, decode_attention])
@pytest.mark.parametrize(("context_lens", "sizes"), DECODES[4:8])  # with 2 to 6 rows
def test_paged_decode_without_qk_norm(function, context_lens, sizes: Sizes) -> None:
    check_decode(function, context_lens, sizes, FP32, qk_norm=False)


@interpreted
def test_both_kernels_leave_shared_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(decode_attention_module, "prefer_shared_memory", launched.append)
    decode(paged_decode, decode_batch([5], (16, 2, 1, 32), FP32))
    assert launched == [None, None]  # the interpreter's launch


@interpreted
@pytest.mark.parametrize("context_lens", [[600, 40, 130], [600, 40, 130, 1, 2]])
def test_decode_does_not_depend_on_how_the_work_is_shared_out(context_lens: list[int]) -> None:
    batch = decode_batch(context_lens, (16, 4, 2, 32), FP32)
    out = decode(paged_decode, batch, num_ranges=1)
    for num_ranges in (2, 5, 40):
        assert torch.equal(decode(paged_decode, batch, num_ranges), out)


@interpreted
@pytest.mark.parametrize("seed", range(3))
def test_paged_attention_of_random_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    group, num_kv_heads = (1, 2, 4, 8)[below(4)], 1 + below(2)
    sizes = ((16, 48, 64, 256)[below(4)], group * num_kv_heads, num_kv_heads, (32, 64)[below(2)])
    rows = [(1 + below(50), below(2) * below(200)) for _ in range(3)]
    batch = paged_batch(
        [new for new, _ in rows], [sum(row) for row in rows], sizes, FP32, seed=seed
    )
    assert relative_error(prefill(paged_prefill, batch), batch.expected()) < TOLERANCE[FP32]
    check_decode(paged_decode, [1 + below(700) for _ in range(3)], sizes, FP32)


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
def test_paged_decode_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    borders = [border + step for border in (16, 64, 256, 512, 4096) for step in (-1, 0, 1, 2)]
    context_lens = [1, 2, *borders, 1000, 32768, 31999, 0, 0]
    check_decode(paged_decode, context_lens, sizes, dtype, "cuda")
    check_decode(paged_decode, context_lens[:3], sizes, dtype, "cuda", qk_norm=False)
    check_decode(paged_decode, context_lens, sizes, dtype, "cuda", qk_norm=False)
    # Whoever shares the batch, and however the work is shared out.
    batch = decode_batch(context_lens, sizes, dtype, "cuda")
    out = decode(paged_decode, batch, num_ranges=33)
    for num_ranges in (1, 40, 264):
        assert torch.equal(decode(paged_decode, batch, num_ranges), out)
    rows = slice(5, 6 + FUSED_ROWS)
    few = replace(
        batch,
        before=replace(
            batch.before,
            context_lens=batch.before.context_lens[rows],
            block_tables=batch.before.block_tables[rows],
        ),
        qkv=batch.qkv[rows],
        positions=batch.positions[rows],
        slot_mapping=batch.slot_mapping[rows],
    )
    assert torch.equal(decode(paged_decode, few), out[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
def test_decode_of_random_ragged_batches_gpu(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = (
        int(random.choice([16, 64, 256])), 8, int(random.choice([1, 2, 4, 8])),
        int(random.choice([64, 128])),
    )  # fmt: skip
    rows = int(random.choice([1, FUSED_ROWS, 12, MANY_ROWS + 20, 2 * MANY_ROWS + 20]))
    context_lens = np.exp(random.uniform(0, np.log(32768), rows)).astype(int).tolist()
    check_decode(paged_decode, context_lens, sizes, BF16, "cuda")
