"""Products of many tokens with the matrices of their experts.

    h[i] = silu(W_gate x) * (W_up x)    of each pair of token and expert, in the plan's order
    y[p] = W_down h[i]                  back in the order of tokens
    out[t] = sum over j of weight[t, j] * y[t, j]      or added to the residual stream

The pairs come sorted by expert (`kernels.moe_plan`), and a tile has pairs of one expert only. How
many tiles an expert has only the device knows: a program finds its own among the experts' counts,
and one past the last tile ends. As many are launched as there could be tiles. A token's outputs are
added up in float32 in the order of its experts: no atomics, results are deterministic.

In fp8 (see `quantization.fp8`) the tensor cores multiply both as they are, 128 of K at a time, and
scales are applied to such sums, or once at the end. For a result in float32 both are widened to
float16 before, so that the sums are exact. Between the two products, a kernel rounds h.

Grid: (tile of outputs, tile of pairs), and for the sum (token, slice of the output). Bytes moved:
the weights of the experts that are hit once, each pair's input and output. Bound by memory up to
some hundred pairs an expert, by arithmetic beyond.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.fp8_rows import as_factor
from nanovllm.kernels.launch import cdiv, launch_dependents, next_power_of_2, pdl, wait
from nanovllm.kernels.moe_plan import MoePlan, max_tiles
from nanovllm.quantization.fp8 import GROUP

_SUM_BLOCK = 1024
Scales = tuple[torch.Tensor, torch.Tensor]


class Tiling(NamedTuple):
    """Sizes of a program: pairs, rows of the weight (gate and up together), and a block of K."""

    rows: int
    outputs: int
    block_k: int
    num_warps: int
    num_stages: int


def tiling(num_pairs: int, num_experts: int, element_size: int, is_exact: bool = False) -> Tiling:
    """Tiles about as high as an expert has pairs; all fit into 99 KiB of shared memory.

    Args:
        element_size: of x and of the weights, in bytes.
        is_exact: they are in fp8, and are to be widened.
    """
    rows = max(16, min(128, next_power_of_2(cdiv(num_pairs, num_experts))))
    if is_exact:
        return Tiling(min(rows, 64), 64, GROUP, 4, 2)
    if element_size == 1:
        return Tiling(rows, 64, GROUP, 4, 5) if rows <= 32 else Tiling(rows, 128, GROUP, 8, 3)
    if element_size > 2:  # no tensor cores: float32 is to be exact
        return Tiling(min(rows, 32), 64, 32, 4, 3)
    if rows <= 32:
        return Tiling(rows, 64, 128, 4, 4)
    return Tiling(rows, 128, 64, 4 if rows == 64 else 8, 3)


def grouped_gate_up(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    plan: MoePlan,
    top_k: int,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """silu(gate) * up of each pair, in the order of `plan.pairs`: [pairs, inner].

    Args:
        x: [tokens, hidden].
        gate_up: [experts, 2 * inner, hidden], gate then up.
        plan: of the tokens' pairs.
        top_k: pairs of a token.
        scales: of x and of the weights, if both are in fp8: [tokens, hidden / g] and
            [experts, 2 * inner, hidden / g] float32, g being `GROUP`, or `hidden`. Those of one
            group are side by side.
        dtype: of the result, if it is not that of x.
    """
    dtype = dtype or x.dtype
    h = torch.empty(len(plan.pairs), gate_up.shape[1] // 2, dtype=dtype, device=x.device)
    _launch(x, gate_up, plan, h, top_k, scales)
    return h


def grouped_down(
    h: torch.Tensor,
    down: torch.Tensor,
    plan: MoePlan,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Each pair's output, in the order of tokens: [pairs, hidden].

    Args:
        h: [pairs, inner], in the order of `plan.pairs`.
        down: [experts, hidden, inner].
        plan: of the pairs.
        scales, dtype: as above.
    """
    y = torch.empty(len(h), down.shape[1], dtype=dtype or h.dtype, device=h.device)
    _launch(h, down, plan, y, None, scales)
    return y


def weighted_sum(
    y: torch.Tensor, weights: torch.Tensor, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of each token's outputs: [tokens, hidden], in y's dtype; `add_to` if given.

    Args:
        y: [tokens * top_k, hidden].
        weights: [tokens, top_k] float32.
        add_to: [tokens, hidden], the sum is added to it in place.
    """
    (tokens, top_k), n = weights.shape, y.shape[1]
    out = add_to
    if out is None:
        out = torch.empty(tokens, n, dtype=y.dtype, device=y.device)
    _weighted_sum_kernel[(tokens, cdiv(n, _SUM_BLOCK))](
        y, weights, out, n, TOP_K=top_k, ADD=add_to is not None, BLOCK=_SUM_BLOCK, num_warps=4,
        **pdl(y),
    )  # fmt: skip
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: MoePlan,
    out: torch.Tensor,
    top_k: int | None,
    scales: Scales | None,
) -> None:
    gated = top_k is not None
    (num_experts, _, k), n = weight.shape, out.shape[1]
    is_exact = scales is not None and out.dtype == torch.float32
    tile = tiling(len(out), num_experts, x.element_size(), is_exact)
    outputs = tile.outputs // 2 if gated else tile.outputs
    grid = (cdiv(n, outputs), max_tiles(len(out), num_experts, tile.rows))
    x_scale, weight_scale = scales or (None, None)
    has_groups = x_scale is not None and x_scale.shape[1] > 1
    _grouped_gemm_kernel[grid](
        x, weight, plan.pairs, plan.offsets, out, num_experts, n, k, top_k or 1,
        x_scale, weight_scale, None if scales is None else len(x), IN_FP8=scales is not None,
        HAS_GROUPS=has_groups, EXACT=is_exact, GATED=gated,
        EXPERTS=next_power_of_2(num_experts),
        ROWS=tile.rows, OUTPUTS=outputs, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **pdl(x),
    )  # fmt: skip


@triton.jit
def _grouped_gemm_kernel(
    x_ptr, weight_ptr, pairs_ptr, offsets_ptr, out_ptr, num_experts, n: tl.constexpr,
    k: tl.constexpr, top_k, x_scale_ptr, weight_scale_ptr, num_rows, IN_FP8: tl.constexpr,
    HAS_GROUPS: tl.constexpr, EXACT: tl.constexpr, GATED: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    # The expert of this tile: as many have all of their tiles before it.
    tile = tl.program_id(1)
    each = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_ptr + each, mask=each < num_experts, other=0)
    ends = tl.load(offsets_ptr + each + 1, mask=each < num_experts, other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    if expert >= num_experts:
        return
    tile -= tl.sum(tl.where(each < expert, tiles, 0), axis=0)
    end = tl.load(offsets_ptr + expert + 1)
    place = tl.load(offsets_ptr + expert) + tile * ROWS + tl.arange(0, ROWS)
    is_own = place < end
    pairs = tl.load(pairs_ptr + place, mask=is_own, other=0)
    if GATED:
        rows_in, rows_out = pairs // top_k, place
    else:
        rows_in, rows_out = place, pairs

    outs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    cols = tl.arange(0, BLOCK_K)
    matrix: tl.constexpr = (2 * n if GATED else n) * k
    xs = x_ptr + rows_in.to(tl.int64)[:, None] * k + cols[None, :]
    weights = weight_ptr + expert.to(tl.int64) * matrix + outs[:, None] * k + cols[None, :]
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    acc_up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if IN_FP8:
        groups: tl.constexpr = (k + BLOCK_K - 1) // BLOCK_K if HAS_GROUPS else 1
        height: tl.constexpr = 2 * n if GATED else n
        x_scales = x_scale_ptr + rows_in
        scales = weight_scale_ptr + expert.to(tl.int64) * (height * groups) + outs
    for start in range(0, k, BLOCK_K):
        inside = (start + cols < k)[None, :]
        x = as_factor(tl.load(xs + start, mask=is_own[:, None] & inside, other=0.0), EXACT)
        mask = (outs < n)[:, None] & inside
        w = as_factor(tl.load(weights + start, mask=mask, other=0.0), EXACT)
        if HAS_GROUPS:
            group = start // BLOCK_K
            x_scale = tl.load(x_scales + group * num_rows, mask=is_own, other=0)
            scale = tl.load(scales + group * height, mask=outs < n, other=0)
            acc += tl.dot(x, tl.trans(w)) * x_scale[:, None] * scale[None, :]
        elif IN_FP8:
            acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            w = as_factor(tl.load(weights + n * k + start, mask=mask, other=0.0), EXACT)
            if HAS_GROUPS:
                scale = tl.load(scales + n + group * height, mask=outs < n, other=0)
                acc_up += tl.dot(x, tl.trans(w)) * x_scale[:, None] * scale[None, :]
            elif IN_FP8:
                acc_up = tl.dot(x, tl.trans(w), acc_up, max_num_imprecise_acc=BLOCK_K)
            else:
                acc_up = tl.dot(x, tl.trans(w), acc_up, input_precision="ieee")
    if IN_FP8 and not HAS_GROUPS:
        x_scale = tl.load(x_scales, mask=is_own, other=0)[:, None]
        acc *= x_scale * tl.load(scales, mask=outs < n, other=0)[None, :]
        if GATED:
            acc_up *= x_scale * tl.load(scales + n, mask=outs < n, other=0)[None, :]
    if GATED:
        acc = silu_times(acc, acc_up)
    cells = rows_out.to(tl.int64)[:, None] * n + outs[None, :]
    mask = is_own[:, None] & (outs < n)[None, :]
    tl.store(out_ptr + cells, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_sum_kernel(
    y_ptr, weights_ptr, out_ptr, n, TOP_K: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        y = tl.load(y_ptr + pair * n + cols, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * y
    target = out_ptr + token * n + cols
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)
