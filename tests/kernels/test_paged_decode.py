"""Decode attention over the paged cache: its plan, and the kernel and its twin against float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nanovllm.kernels.paged_decode import (
    FUSED_ROWS,
    MANY_ROWS,
    MAX_CHUNKS,
    _balance,
    max_tiles,
    paged_decode_torch,
    paged_decode_triton,
    plan_decode,
)
from nanovllm.kernels.paged_prefill import paged_prefill_triton
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store_torch

from helpers.attention import GPU_SIZES, prefill
from helpers.kernel_inputs import (
    BF16,
    FP32,
    TOLERANCE,
    DecodeBatch,
    Sizes,
    decode_batch,
    interpreted,
    on_cpu,
    paged_batch,
    relative_error,
)
from nanovllm.kernels import paged_decode
from nanovllm.kernels.paged_cache import tile_tokens

pytestmark = pytest.mark.usefixtures("poison")


# The plan


@pytest.mark.parametrize("padded_rows", [FUSED_ROWS, 40, MANY_ROWS + 1, 2 * MANY_ROWS + 1])
@pytest.mark.parametrize("num_ranges", [1, 7, 66])
@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
@pytest.mark.parametrize("seed", range(4))
def test_plan_holds_every_token_once(
    seed: int, block_size: int, num_ranges: int, padded_rows: int
) -> None:
    random = np.random.default_rng(seed)
    edges = [1, 2, 17, 64, 65, 66, 512, 513, 514, 4096, 4097, 4098, 32768, 40960]
    context_lens = random.permutation(edges + random.integers(1, 1500, 20).tolist())
    width = -(-max(context_lens) // block_size)
    tables = random.permutation(len(context_lens) * width).reshape(-1, width).astype(np.int32)
    # A fused kernel has the newest token in registers.
    lengths = context_lens - (padded_rows <= FUSED_ROWS)
    plan = plan_decode(context_lens, tables, block_size, num_ranges, padded_rows)

    # Chunks lie in any order, each in one piece.
    chunk_of_tile = plan.tiles[:, 1] >> 10
    borders = np.flatnonzero(np.diff(chunk_of_tile, prepend=-1, append=-1))
    assert len(borders) - 1 == len(set(chunk_of_tile))
    in_order = plan.tiles[np.argsort(chunk_of_tile, kind="stable")]
    slots, info = in_order.T
    rows, chunks, tokens = info >> 16, (info >> 10) & 63, info & 127
    found = [slot + i for slot, count in zip(slots, tokens) for i in range(count)]
    assert found == [
        tables[row, i // block_size] * block_size + i % block_size
        for row, length in enumerate(lengths)
        for i in range(length)
    ]
    tiles_of_row = np.maximum(1, -(-lengths // tile_tokens(block_size)))
    assert np.bincount(rows).tolist() == tiles_of_row.tolist()
    assert len(info) <= max_tiles(len(context_lens), max(context_lens), block_size)
    counts = np.array([len(set(chunks[rows == row])) for row in range(len(lengths))])
    assert plan.chunk_counts.tolist() == counts.tolist()
    assert counts.min() >= 1 and counts.max() <= MAX_CHUNKS

    first, last, newest = (plan.tiles[:, 1] & flag > 0 for flag in (128, 256, 512))
    assert np.flatnonzero(first).tolist() == borders[:-1].tolist()
    assert np.flatnonzero(last).tolist() == (borders[1:] - 1).tolist()
    assert (newest == ((chunk_of_tile & 63) == counts[chunk_of_tile >> 6] - 1)).all()

    assert plan.bounds.shape == (num_ranges + 1,)
    assert set(plan.bounds) <= set(borders)
    assert (plan.bounds[0], plan.bounds[-1]) == (0, len(info))
    loads = np.diff(plan.bounds) + np.diff(np.searchsorted(borders, plan.bounds))
    assert loads.max() - loads.min() <= np.diff(borders).max() + 1

    alone = plan_decode(context_lens[5:6], tables[5:6], block_size, num_ranges, padded_rows).tiles
    alone = alone[np.argsort(alone[:, 1] >> 10, kind="stable")]
    assert (alone + np.array([0, 5 << 16])).tolist() == in_order[rows == 5].tolist()


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (1, [1, 2, 8, 5, 10, 32]), (FUSED_ROWS + 1, [1, 1, 4, 3, 5, 32]),
        (MANY_ROWS + 1, [1, 1, 1, 2, 3, 32]), (2 * MANY_ROWS + 1, [1, 1, 1, 1, 2, 32]),
    ],
)  # fmt: skip
def test_chunks_depend_on_the_context_and_the_class_of_the_batch(rows: int, counts: list[int]):
    context_lens = np.array([64, 128, 512, 600, 1200, 40000]) + (rows <= FUSED_ROWS)
    tables = np.arange(6 * 157, dtype=np.int32).reshape(6, 157)
    plan = plan_decode(context_lens, tables, 256, 33, rows)
    assert plan.chunk_counts.tolist() == counts


def test_chunks_are_dealt_out_longest_first_and_their_ends_count():
    assert _balance(np.array([1, 1, 2]), 2).tolist() == [1, 1, 0]  # not 1 and 2 against 1
    # Four chunks of 2 cost 12, one of 10 costs 11: the fifth goes there, though it has more tiles.
    assert _balance(np.array([10, 2, 2, 2, 2, 2]), 2).tolist() == [0, 1, 1, 1, 1, 0]


# The kernel


def decode(function, batch: DecodeBatch, num_ranges: int = 7) -> torch.Tensor:
    before = batch.before
    if function is paged_decode_torch:
        q = qk_norm_rope_store_torch(*batch.new_token)
        return paged_decode_torch(
            q, before.k_cache, before.v_cache, before.context_lens, before.block_tables,
            before.scale,
        )  # fmt: skip
    real = before.context_lens > 0
    context_lens, block_tables = (
        tensor[real].cpu().numpy() for tensor in (before.context_lens, before.block_tables)
    )
    plan = plan_decode(
        context_lens, block_tables, before.k_cache.shape[1], num_ranges, len(batch.qkv)
    )
    bounds, chunk_counts, tiles = (torch.from_numpy(piece).to(batch.qkv.device) for piece in plan)
    padding = torch.zeros_like(before.context_lens[~real])
    plan = (bounds, torch.cat((chunk_counts, padding)), tiles)
    return paged_decode_triton(*batch.new_token, plan, before.scale)


def check_decode(function, context_lens: list[int], sizes: Sizes, dtype, device: str = "cpu"):
    batch = decode_batch(context_lens, sizes, dtype, device)
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
    ([1, 600, 64, 65], (16, 4, 2, 64)),
    ([513, 1, 2, 0, 0, 0], (64, 8, 8, 32)),
    ([4200, 1, 9, 2, 3], (64, 2, 1, 32)),  # 17 chunks, and single ones
    ([513, 1, 64, 1200] + [20] * MANY_ROWS + [0], (64, 2, 1, 32)),
]


@interpreted
@on_cpu
@pytest.mark.parametrize("function", [paged_decode_triton, paged_decode_torch])
@pytest.mark.parametrize(("context_lens", "sizes"), DECODES)
def test_paged_decode(function, context_lens, sizes: Sizes, dtype: torch.dtype) -> None:
    check_decode(function, context_lens, sizes, dtype)


@interpreted
def test_combine_leaves_shared_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(paged_decode, "prefer_shared_memory", launched.append)
    decode(paged_decode_triton, decode_batch([5], (16, 2, 1, 32), FP32))
    assert launched == [None]  # the interpreter's launch


@interpreted
@pytest.mark.parametrize("context_lens", [[600, 40, 130], [600, 40, 130, 1, 2]])
def test_decode_does_not_depend_on_how_the_work_is_shared_out(context_lens: list[int]) -> None:
    batch = decode_batch(context_lens, (16, 4, 2, 32), FP32)
    out = decode(paged_decode_triton, batch, num_ranges=1)
    for num_ranges in (2, 5, 40):
        assert torch.equal(decode(paged_decode_triton, batch, num_ranges), out)


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
    assert relative_error(prefill(paged_prefill_triton, batch), batch.expected()) < TOLERANCE[FP32]
    check_decode(paged_decode_triton, [1 + below(700) for _ in range(3)], sizes, FP32)


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "dtype"), GPU_SIZES)
def test_paged_decode_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    borders = [border + step for border in (16, 64, 256, 512, 4096) for step in (-1, 0, 1, 2)]
    context_lens = [1, 2, *borders, 1000, 32768, 31999, 0, 0]
    check_decode(paged_decode_triton, context_lens, sizes, dtype, "cuda")
    # Whoever shares the batch, and however the work is shared out.
    batch = decode_batch(context_lens, sizes, dtype, "cuda")
    out = decode(paged_decode_triton, batch, num_ranges=33)
    for num_ranges in (1, 40, 264):
        assert torch.equal(decode(paged_decode_triton, batch, num_ranges), out)
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
    assert torch.equal(decode(paged_decode_triton, few), out[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
def test_decode_of_random_ragged_batches_gpu(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = (
        int(random.choice([16, 64, 256])), 8, int(random.choice([1, 2, 4, 8])),
        int(random.choice([64, 128])),
    )  # fmt: skip
    rows = int(random.choice([1, FUSED_ROWS, 12, MANY_ROWS + 20]))
    context_lens = np.exp(random.uniform(0, np.log(32768), rows)).astype(int).tolist()
    check_decode(paged_decode_triton, context_lens, sizes, BF16, "cuda")
