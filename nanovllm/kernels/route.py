"""The router of a mixture of experts: softmax, the top-k experts, their weights.

One warp has all of a token's logits in registers. It takes the largest probability `top_k` times;
of equal ones that of the lowest index, as `torch.topk` does on a GPU.

Grid: (token). Bytes moved a token of E experts: reads E logits, writes 8 top_k. Bound by the
launch.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import launch_dependents, next_power_of_2, pdl, wait


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, the likeliest first.

    Args:
        logits: [tokens, experts].
        top_k: how many of the experts, not more than there are.
        renormalize: divide the chosen ones' probabilities by their sum.

    Returns:
        [tokens, top_k] int32, the experts, and float32, their weights.
    """
    tokens, num_experts = logits.shape
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            logits, experts, weights, num_experts,
            TOP_K=top_k, SLOTS=next_power_of_2(top_k),
            EXPERTS=next_power_of_2(num_experts), RENORMALIZE=renormalize,
            num_warps=1, **pdl(logits),
        )  # fmt: skip
    return experts, weights


@triton.jit
def _route_kernel(
    logits_ptr, experts_ptr, weights_ptr, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    logits = tl.load(
        logits_ptr + token * num_experts + expert, mask=expert < num_experts, other=-float("inf")
    ).to(tl.float32)
    p = tl.exp(logits - tl.max(logits, axis=0))
    p = tl.where(expert < num_experts, p / tl.sum(p, axis=0), -1.0)

    slot = tl.arange(0, SLOTS)
    experts = tl.zeros([SLOTS], tl.int32)
    weights = tl.zeros([SLOTS], tl.float32)
    for i in tl.static_range(TOP_K):
        # Logits that are not numbers must not lead out of the weights.
        best = tl.minimum(tl.argmax(p, axis=0, tie_break_left=True), num_experts - 1)
        weights = tl.where(slot == i, tl.max(p, axis=0), weights)
        experts = tl.where(slot == i, best, experts)
        p = tl.where(expert == best, -1.0, p)
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=0)
    cells = token * TOP_K + slot
    tl.store(experts_ptr + cells, experts, mask=slot < TOP_K)
    tl.store(weights_ptr + cells, weights, mask=slot < TOP_K)
