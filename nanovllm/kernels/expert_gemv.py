"""The experts of a few tokens: each matrix times one vector.

    h[t, j] = silu(W_gate x[t]) * (W_up x[t])             of expert j of token t
    out[t] = sum over j of weight[t, j] * W_down h[t, j]      or added to the residual stream

With few tokens hardly two share an expert, and a product is the reading of its matrix. A program
streams some rows of it, in loads of 16 bytes a thread; the second kernel's has these rows of all of
a token's experts, so that their sum needs no further kernel: it is in float32, in the order of the
experts, and no atomics are used. What two tokens share comes from the second-level cache the second
time.

Grid: (slice of the inner features, pair of token and expert), then (slice of the output, token).
Bytes moved: the weights of the experts that are hit. Bound by memory.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.activation import silu_times
from nanovllm.kernels.launch import (
    cdiv,
    launch_dependents,
    next_power_of_2,
    pdl,
    prefer_shared_memory,
    wait,
)

MAX_TOKENS = 8
_INNER_ROWS, _OUTPUT_ROWS = 8, 4  # of the weight in a program: some hundred programs for a token
_BLOCK_K = 512


def expert_gate_up(x: torch.Tensor, gate_up: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of each pair: [tokens * top_k, inner], in the dtype of x.

    Args:
        x: [tokens, hidden].
        gate_up: [experts, 2 * inner, hidden], gate then up.
        experts: [tokens, top_k] int32.
    """
    k, n, num_pairs = x.shape[1], gate_up.shape[1] // 2, experts.numel()
    h = torch.empty(num_pairs, n, dtype=x.dtype, device=x.device)
    kernel = _gate_up_kernel[(cdiv(n, _INNER_ROWS), num_pairs)](
        x, gate_up, experts, h, n, k, experts.shape[1], ROWS=_INNER_ROWS,
        BLOCK_K=_block(k), num_warps=4, **pdl(x),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return h


def expert_down(
    h: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of the experts' outputs: [tokens, hidden], in h's dtype; `add_to` if given.

    Args:
        h: [tokens * top_k, inner].
        down: [experts, hidden, inner].
        experts, weights: [tokens, top_k] int32 and float32.
        add_to: [tokens, hidden], the sum is added to it in place.
    """
    (tokens, top_k), n, k = experts.shape, down.shape[1], h.shape[1]
    out = add_to
    if out is None:
        out = torch.empty(tokens, n, dtype=h.dtype, device=h.device)
    kernel = _down_kernel[(cdiv(n, _OUTPUT_ROWS), tokens)](
        h, down, experts, weights, out, n, k, TOP_K=top_k, ADD=add_to is not None,
        ROWS=_OUTPUT_ROWS, BLOCK_K=min(256, _block(k)), num_warps=4, **pdl(h),
    )  # fmt: skip
    prefer_shared_memory(kernel)
    return out


def _block(k: int) -> int:
    return min(_BLOCK_K, next_power_of_2(k))


@triton.jit
def _gate_up_kernel(
    x_ptr, weight_ptr, experts_ptr, h_ptr, n, k: tl.constexpr, top_k,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    pair = tl.program_id(1)
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    outs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    gates = weight_ptr + (expert * 2 * n + outs)[:, None] * k + cols[None, :]
    ups = weight_ptr + (expert * 2 * n + n + outs)[:, None] * k + cols[None, :]
    # The same for every row, but laid out like the weights: no exchange between threads.
    xs = x_ptr + (pair // top_k).to(tl.int64) * k + cols[None, :] + outs[:, None] * 0
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    acc_up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in tl.static_range(0, k, BLOCK_K):
        inside = (start + cols < k)[None, :]
        mask = (outs < n)[:, None] & inside
        gate = tl.load(gates + start, mask=mask, other=0.0, cache_modifier=".cg")
        up = tl.load(ups + start, mask=mask, other=0.0, cache_modifier=".cg")
        x = tl.load(xs + start, mask=inside, other=0.0).to(tl.float32)
        acc += gate.to(tl.float32) * x
        acc_up += up.to(tl.float32) * x
    y = silu_times(tl.sum(acc, axis=1), tl.sum(acc_up, axis=1))
    tl.store(h_ptr + pair.to(tl.int64) * n + outs, y.to(h_ptr.dtype.element_ty), mask=outs < n)


@triton.jit
def _down_kernel(
    h_ptr, weight_ptr, experts_ptr, weights_ptr, out_ptr, n, k: tl.constexpr,
    TOP_K: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    token = tl.program_id(1).to(tl.int64)
    outs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    hs = h_ptr + cols[None, :] + outs[:, None] * 0  # laid out like the weights
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        matrix = weight_ptr + (expert * n + outs)[:, None] * k + cols[None, :]
        weight = tl.load(weights_ptr + pair)
        for start in tl.static_range(0, k, BLOCK_K):
            inside = (start + cols < k)[None, :]
            mask = (outs < n)[:, None] & inside
            w = tl.load(matrix + start, mask=mask, other=0.0, cache_modifier=".cg")
            h = tl.load(hs + pair * k + start, mask=inside, other=0.0)
            acc += w.to(tl.float32) * (weight * h.to(tl.float32))
    total = tl.sum(acc, axis=1)
    target = out_ptr + token * n + outs
    if ADD:
        total += tl.load(target, mask=outs < n, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=outs < n)
