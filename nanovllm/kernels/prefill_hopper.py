"""Prefill attention for Hopper: one warp loads, two groups of four warps attend (in Gluon).

What `kernels.prefill_attention` computes, as FlashAttention-3 does it (Shah et al. 2024,
arXiv:2407.08608): keys and values come by the tensor memory accelerator, through the block table,
while a tile's products with the values run beside the softmax of the tile that follows, and one
group's beside the other's. Groups have a head each, of two that share keys, so each tile of keys is
loaded once for both. Tiles of keys go from the diagonal back.

Grid: a program for each multiprocessor. Tiles of queries (see `prefill_plan`), longest first, are
dealt out forth and back: the program with the longest tile of a turn has the shortest of the next.
Bound by arithmetic: 4 * head_dim operations a query, key and head.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.launch import gpu_with
from nanovllm.kernels.paged_cache import LOG2_E
from nanovllm.kernels.prefill_plan import WORDS, PrefillPlan

# Names that Triton has changed since 3.6: of a copy, of a barrier for a group's threads, and of a
# view of memory.
_copy_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_SHORT_CONTEXT = 1024  # up to which narrow tiles of keys are faster


def prefill_on_hopper(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: PrefillPlan,
    block_tables: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `paged_prefill` returns. Heads 2 i and 2 i + 1 share keys, and blocks have a multiple of
    64 tokens."""
    out = torch.empty_like(q)
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    keys, stages = (64, 4) if plan.max_context_len <= _SHORT_CONTEXT else (128, 2)
    gpu, num_tiles, pairs = gpu_with(q), len(plan.tiles), num_heads // 2
    num_sms = 1 if gpu is None else gpu.num_sms
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptors = (
        TensorDescriptor.from_tensor(each.view(-1, each.shape[-2] * head_dim), [64, 64], layout)
        for each in (q, k_cache, v_cache)
    )
    _prefill_on_hopper_kernel[(min(num_sms, num_tiles * pairs),)](
        *descriptors, out, plan.tiles, num_tiles, block_tables, block_tables.stride(0),
        scale * LOG2_E, PAIRS=pairs, PER_KV=num_heads // num_kv_heads, BLOCK_SIZE=block_size,
        D=head_dim, BN=keys, STAGES=stages, WORDS=WORDS, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


@gluon.jit
def _tile_of(turn, tiles_ptr, num_tiles, PAIRS: gl.constexpr, WORDS: gl.constexpr):
    """A program's turn: which two heads, and a tile's entry of `PrefillPlan.tiles`. Where there is
    nothing to do, it has no queries."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    at = turn * programs + (program if turn % 2 == 0 else programs - 1 - program)
    tile_ptr = tiles_ptr + gl.minimum(at // PAIRS, num_tiles - 1) * WORDS
    count = gl.where(at < num_tiles * PAIRS, gl.load(tile_ptr + 1), 0)
    first_query, position = gl.load(tile_ptr), gl.load(tile_ptr + 2)
    return at % PAIRS, first_query, count, position, gl.load(tile_ptr + 3), gl.load(tile_ptr + 4)


@gluon.jit
def _load(
    inputs, descs, bufs, bars, turns, PAIRS: gl.constexpr, PER_KV: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """The warp that has queries, keys and values copied, as memory for them becomes free."""
    tiles_ptr, num_tiles, tables_ptr, table_stride = inputs
    q_desc, k_desc, v_desc = descs
    q_bufs, k_bufs, v_bufs = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    STAGES: gl.constexpr = k_bufs.shape[0]
    BN: gl.constexpr = k_bufs.shape[1]
    D: gl.constexpr = k_bufs.shape[2]
    # The memory of a [rows, D] tile: panels of 64 columns, each row after row, in parts of 64.
    PANELS: gl.constexpr = D // 64
    PARTS: gl.constexpr = BN // 64
    q_parts = _parts_of(q_bufs, q_desc, 4 * PANELS)
    k_parts = _parts_of(k_bufs, k_desc, STAGES * PANELS * PARTS)
    v_parts = _parts_of(v_bufs, v_desc, STAGES * PANELS * PARTS)
    step = 0
    used = 0
    for turn in range(turns):
        pair, first_query, count, position, row, context = _tile_of(
            turn, tiles_ptr, num_tiles, PAIRS, WORDS
        )
        if count > 0:
            buf = used % 2
            mbarrier.wait(q_empty.index(buf), (used // 2 & 1) ^ 1)
            mbarrier.expect(q_full.index(buf), 2 * 64 * D * 2)
            for head in gl.static_range(2):
                for panel in gl.static_range(PANELS):
                    _copy_async(
                        q_desc, [first_query, (2 * pair + head) * D + 64 * panel],
                        q_full.index(buf), q_parts.index((2 * buf + head) * PANELS + panel),
                    )  # fmt: skip
            used += 1
            column = pair * 2 // PER_KV * D
            table_ptr = tables_ptr + row.to(gl.int64) * table_stride
            last_block = (context - 1) // BLOCK_SIZE
            key_tiles = (position + count + BN - 1) // BN
            for j in range(key_tiles):
                start = (key_tiles - 1 - j) * BN
                # Tokens past the context, which are masked, may be of any block that there is.
                block = gl.load(table_ptr + start // BLOCK_SIZE)
                block_2 = gl.load(table_ptr + gl.minimum((start + 64) // BLOCK_SIZE, last_block))
                slot = block * BLOCK_SIZE + start % BLOCK_SIZE
                slot_2 = block_2 * BLOCK_SIZE + (start + 64) % BLOCK_SIZE
                stage = step % STAGES
                phase = (step // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                _copy(k_desc, slot, slot_2, column, k_full.index(stage), k_parts, stage, D, BN)
                mbarrier.wait(v_empty.index(stage), phase)
                _copy(v_desc, slot, slot_2, column, v_full.index(stage), v_parts, stage, D, BN)
                step += 1


@gluon.jit
def _parts_of(bufs, desc, parts: gl.constexpr):
    """The same memory as matrices of 64 x 64."""
    if _REINTERPRET:
        return bufs.reinterpret(bufs.dtype, [parts, 64, 64], desc.layout)
    else:
        return bufs._reinterpret(bufs.dtype, [parts, 64, 64], desc.layout)


@gluon.jit
def _copy(
    desc, slot, slot_2, column, full, parts, stage, D: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    """Have a tile of keys or values copied: 64 tokens from `slot` on, and for a tile of 128 another
    64 from `slot_2` on."""
    mbarrier.expect(full, BN * D * 2)
    PARTS: gl.constexpr = BN // 64
    for panel in gl.static_range(D // 64):
        at = (stage * (D // 64) + panel) * PARTS
        where = column + 64 * panel
        _copy_async(desc, [slot, where], full, parts.index(at))
        if PARTS == 2:
            _copy_async(desc, [slot_2, where], full, parts.index(at + 1))


@gluon.jit
def _release(bar):
    """Say that this group has read the memory that the barrier guards."""
    _barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _visible(scores, start, position):
    """Scores of 64 queries from a position on, -inf for keys (from `start` on) that come later."""
    layout: gl.constexpr = scores.type.layout
    rows = position + gl.arange(0, 64, gl.SliceLayout(1, layout))
    keys = start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(rows, 1), scores, float("-inf"))


@gluon.jit
def _attend(
    inputs, bufs, bars, out_ptr, turns, scale_log2, WHICH: gl.constexpr, PAIRS: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """Four warps that attend with one of two heads."""
    tiles_ptr, num_tiles, _, _ = inputs
    q_bufs, k_bufs, v_bufs = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    STAGES: gl.constexpr = k_bufs.shape[0]
    BN: gl.constexpr = k_bufs.shape[1]
    D: gl.constexpr = k_bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    # 16 bytes a thread, and whole rows.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    nothing = gl.zeros([64, BN], gl.float32, s_layout)
    step = 0
    used = 0
    pair, first_query, count, position, _, context = _tile_of(0, tiles_ptr, num_tiles, PAIRS, WORDS)
    for turn in range(turns):
        # Loaded a turn ahead, so that nothing waits for it.
        pair_2, first_query_2, count_2, position_2, _, context_2 = _tile_of(
            turn + 1, tiles_ptr, num_tiles, PAIRS, WORDS
        )
        if count > 0:
            buf = used % 2
            q = q_bufs.index(2 * buf + WHICH)
            mbarrier.wait(q_full.index(buf), used // 2 & 1)

            # The tile of keys with the diagonal.
            key_tiles = (position + count + BN - 1) // BN
            start = (key_tiles - 1) * BN
            stage = step % STAGES
            phase = step // STAGES & 1
            mbarrier.wait(k_full.index(stage), phase)
            keys = k_bufs.index(stage).permute((1, 0))
            token = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(token,))
            _release(k_empty.index(stage))
            scores = _visible(scores, start, position)
            m = gl.maximum(gl.max(scores, axis=1) * scale_log2, -1.0e30)  # not -inf
            weights = gl.exp2(scores * scale_log2 - gl.expand_dims(m, 1))
            total = gl.sum(weights, axis=1)
            p = gl.convert_layout(weights.to(q_bufs.dtype), p_layout)
            acc = gl.zeros([64, D], gl.float32, o_layout)
            if start + BN > context:  # what was never written there may be NaN
                mbarrier.wait(v_full.index(stage), phase)
                values = v_bufs.index(stage).load(wide)
                written = gl.arange(0, BN, gl.SliceLayout(1, wide)) < context - start
                values = gl.where(gl.expand_dims(written, 1), values, 0.0)
                v_bufs.index(stage).store(values.to(v_bufs.dtype))
                fence_async_shared()
                _barrier()

            # From there back: scores of a tile, and beside its softmax the values of the last one.
            for j in range(1, key_tiles):
                start = (key_tiles - 1 - j) * BN
                last_stage = stage
                last_phase = phase
                step += 1
                stage = step % STAGES
                phase = step // STAGES & 1
                mbarrier.wait(k_full.index(stage), phase)
                keys = k_bufs.index(stage).permute((1, 0))
                token = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(last_stage), last_phase)
                acc_token = warpgroup_mma(p, v_bufs.index(last_stage), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(token,))
                _release(k_empty.index(stage))
                if start + BN > position + 1:
                    scores = _visible(scores, start, position)
                m_new = gl.maximum(m, gl.max(scores, axis=1) * scale_log2)
                alpha = gl.exp2(m - m_new)
                weights = gl.exp2(scores * scale_log2 - gl.expand_dims(m_new, 1))
                total = total * alpha + gl.sum(weights, axis=1)
                m = m_new
                # This barrier is passed already. Its loop keeps the assembler from moving the wait
                # that follows before all of the above, beside which the product runs.
                mbarrier.wait(v_full.index(last_stage), last_phase)
                acc, p, weights, total = warpgroup_mma_wait(0, deps=(acc_token, p, weights, total))
                _release(v_empty.index(last_stage))
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
                p = gl.convert_layout(weights.to(q_bufs.dtype), p_layout)
            mbarrier.wait(v_full.index(stage), phase)
            token = warpgroup_mma(p, v_bufs.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(token,))
            _release(v_empty.index(stage))
            step += 1
            used += 1

            # Through the memory of the queries, so that rows are stored in wide pieces.
            acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, o_rows), 1)
            q.store(acc.to(q_bufs.dtype))
            _barrier()
            out = q.load(wide)
            fence_async_shared()
            _release(q_empty.index(buf))
            rows = gl.arange(0, 64, gl.SliceLayout(1, wide))
            dims = gl.arange(0, D, gl.SliceLayout(0, wide))
            cells = (first_query + rows).to(gl.int64) * (2 * PAIRS * D) + (2 * pair + WHICH) * D
            gl.store(
                out_ptr + gl.expand_dims(cells, 1) + gl.expand_dims(dims, 0), out,
                mask=gl.expand_dims(rows < count, 1),
            )  # fmt: skip
        pair, first_query, count = pair_2, first_query_2, count_2
        position, context = position_2, context_2


@gluon.jit(do_not_specialize=["num_tiles", "table_stride"])
def _prefill_on_hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, tiles_ptr, num_tiles, tables_ptr, table_stride, scale_log2,
    PAIRS: gl.constexpr, PER_KV: gl.constexpr, BLOCK_SIZE: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = q_desc.layout
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [4, 64, D], layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], layout)
    v_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], layout)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barriers)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    bufs = (q_bufs, k_bufs, v_bufs)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    inputs = (tiles_ptr, num_tiles, tables_ptr, table_stride)
    turns = (num_tiles * PAIRS + gl.num_programs(0) - 1) // gl.num_programs(0)
    descs = (q_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_attend, (inputs, bufs, bars, out_ptr, turns, scale_log2, 0, PAIRS, WORDS)),
            (_attend, (inputs, bufs, bars, out_ptr, turns, scale_log2, 1, PAIRS, WORDS)),
            (_load, (inputs, descs, bufs, bars, turns, PAIRS, PER_KV, BLOCK_SIZE, WORDS)),
        ],
        [4, 1], [240, 24],  # of the last two: warps, and registers of a thread
    )  # fmt: skip
