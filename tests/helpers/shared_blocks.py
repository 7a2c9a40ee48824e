"""Batches whose rows begin with the same blocks, and what a decode plan says of them."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from helpers.kernel_inputs import DecodeBatch, PagedBatch
from nanovllm.kernels.decode_plan import CHUNK_SHIFT, FIRST, DecodePlan

Shared = tuple[Sequence[int], int]  # rows, and how many of their first tokens they have in common


def random_tables(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Block tables that share nothing."""
    return np.random.default_rng(seed).permutation(rows * width).reshape(rows, -1).astype(np.int32)


def share_blocks(tables, shared: Sequence[Shared], block_size: int) -> None:
    """Let rows have the first blocks of the first one of them; in place, of NumPy or torch."""
    for rows, tokens in shared:
        assert tokens % block_size == 0
        for row in rows[1:]:
            tables[row, : tokens // block_size] = tables[rows[0], : tokens // block_size]


def share_in_batch(batch: DecodeBatch, shared: Sequence[Shared]) -> None:
    """The same of a batch. Blocks that no row has any more are NaN."""
    tables, lens = batch.before.block_tables, batch.before.context_lens.tolist()
    block_size = batch.before.k_cache.shape[1]
    share_blocks(tables, shared, block_size)
    used = {
        block for row, n in enumerate(lens) for block in tables[row, : -(-n // block_size)].tolist()
    }
    unused = sorted(set(range(len(batch.before.k_cache))) - used)
    for caches in (batch.before, batch.after):
        caches.k_cache[unused] = caches.v_cache[unused] = float("nan")


def with_own_blocks(batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(keys, values, block tables): as in a batch, with a copy of every block for each row."""
    rows, width = batch.block_tables.shape
    flat = batch.block_tables.flatten().long()
    tables = torch.arange(rows * width, dtype=torch.int32, device=flat.device).view(rows, width)
    k_cache, v_cache = (
        cache.view(torch.uint8)[flat].view(cache.dtype)  # torch indexes no fp8
        for cache in (batch.k_cache, batch.v_cache)
    )
    return k_cache, v_cache, tables


def chunks_in(plan: DecodePlan, tile: int) -> dict[tuple[int, int], list[int]]:
    """By row and chunk the slots of all its tokens, in the order of both lists of a plan of NumPy.

    A chunk may be in one list only, once.
    """
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    words = plan.tiles.ravel()
    begin = len(words) if plan.list_begin is None else int(plan.list_begin[0])
    width = plan.tiles.shape[1]
    span = tile // (width - 1)
    assert plan.bounds[-1] * width == begin
    for *slots, info in words[:begin].reshape(-1, width).tolist():
        key = info >> 16, (info >> CHUNK_SHIFT) & 31
        assert bool(info & FIRST) == (key not in found), "a chunk lies in one piece"
        found[key] += [slot + i for slot in slots for i in range(span)][: info & 255]
    for rows, chunk, slots in shared_pieces(plan):
        for row in rows:
            assert (row, chunk) not in found
            found[row, chunk] = [slot + i for slot in slots for i in range(span)]
    return found


def shared_pieces(plan: DecodePlan) -> list[tuple[list[int], int, list[int]]]:
    """(rows, chunk, first slots of the tiles' spans) of each piece, range by range."""
    if plan.list_begin is None:
        return []
    words = plan.tiles.ravel()[int(plan.list_begin[0]) :].tolist()
    num_ranges = len(plan.bounds) - 1
    bounds = words[: num_ranges + 1]
    assert bounds == sorted(bounds)
    pieces = []
    for piece in range(num_ranges + 1, bounds[-1], 3):
        first_row, first_tile, chunk, end_row, end_tile = words[piece : piece + 5]
        pieces.append((words[first_row:end_row], chunk, words[first_tile:end_tile]))
    return pieces
