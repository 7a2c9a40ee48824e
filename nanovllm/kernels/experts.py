"""What serves the experts of a step: the one place where their kernels are chosen.

Up to `expert_gemv.MAX_TOKENS` tokens have a GEMV for each of their experts; more are sorted by
expert (`kernels.moe_plan`) and go through `kernels.grouped_gemm`. Either way nothing depends on the
host, so that a CUDA Graph can hold it. With weights in fp8 it is the same, and what comes to each
of the two products is rounded to fp8 before, by `kernels.fp8_rows`.
"""

import torch

from nanovllm.kernels import expert_gemv
from nanovllm.kernels.expert_gemv import expert_down, expert_gate_up
from nanovllm.kernels.fp8_expert_gemv import fp8_expert_down, fp8_expert_gate_up
from nanovllm.kernels.fp8_rows import quantize_rows
from nanovllm.kernels.grouped_gemm import grouped_down, grouped_gate_up, weighted_sum
from nanovllm.kernels.moe_plan import plan_experts
from nanovllm.quantization.fp8 import Fp8Weight


def apply_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | Fp8Weight,
    down: torch.Tensor | Fp8Weight,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum over a token's experts e of weight[e] * W_down[e] (silu(W_gate[e] x) * (W_up[e] x)).

    Args:
        x: [tokens, hidden].
        experts, weights: [tokens, top_k] int32 and float32, see `kernels.route`.
        gate_up: [experts, 2 * inner, hidden], gate then up.
        down: [experts, hidden, inner].
        add_to: [tokens, hidden], the sum is added to it in place.

    Returns:
        [tokens, hidden] in the dtype of x; `add_to` if given.
    """
    if len(x) == 0:
        return torch.empty_like(x) if add_to is None else add_to
    if isinstance(gate_up, Fp8Weight) and isinstance(down, Fp8Weight):
        return _in_fp8(x, experts, weights, gate_up, down, add_to)
    assert isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor)
    if len(x) <= expert_gemv.MAX_TOKENS:
        h = expert_gate_up(x, gate_up, experts)
        return expert_down(h, down, experts, weights, add_to)
    plan = plan_experts(experts, len(gate_up))
    h = grouped_gate_up(x, gate_up, plan, experts.shape[1])
    return weighted_sum(grouped_down(h, down, plan), weights, add_to)


def _in_fp8(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    add_to: torch.Tensor | None,
) -> torch.Tensor:
    values, scale = quantize_rows(x, gate_up.group)
    if len(x) <= expert_gemv.MAX_TOKENS:
        h = fp8_expert_gate_up(values, scale, gate_up, experts, x.dtype)
        out = torch.empty_like(x) if add_to is None else add_to
        rounded = quantize_rows(h, down.group)
        return fp8_expert_down(*rounded, down, experts, weights, out, add_to is not None)
    plan = plan_experts(experts, len(gate_up.values))
    scales = scale, gate_up.scale
    h = grouped_gate_up(values, gate_up.values, plan, experts.shape[1], scales, x.dtype)
    values, scale = quantize_rows(h, down.group)
    y = grouped_down(values, down.values, plan, (scale, down.scale), x.dtype)
    return weighted_sum(y, weights, add_to)
