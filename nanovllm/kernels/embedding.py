"""Token embedding, of tokens that the host knows and of tokens that only the device knows yet.

Grid: one program a token. Bytes moved: the token's vector read and written. Bound by latency.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.launch import launch_dependents, next_power_of_2, pdl, wait


def embed(
    token_ids: torch.Tensor,
    sampled: torch.Tensor,
    weight: torch.Tensor,
    part: slice | None = None,
) -> torch.Tensor:
    """Vectors of tokens: [tokens, hidden].

    Args:
        token_ids: [tokens] int32; -1 - i stands for `sampled[i]`.
        sampled: [rows] int64, the tokens that the previous step sampled.
        weight: [vocab, hidden].
        part: the tokens whose vectors `weight` has, if not all; zeros stand for the others.
    """
    tokens, n = token_ids.shape[0], weight.shape[1]
    out = torch.empty(tokens, n, dtype=weight.dtype, device=weight.device)
    block = next_power_of_2(n)
    _embed_kernel[(tokens,)](
        token_ids, sampled, weight, out, n, 0 if part is None else part.start, weight.shape[0],
        HAS_PART=part is not None, BLOCK=block, num_warps=min(8, max(1, block // 512)),
        **pdl(weight),
    )  # fmt: skip
    return out


@triton.jit
def _embed_kernel(
    token_ids_ptr, sampled_ptr, weight_ptr, out_ptr, n, first_token, num_tokens,
    HAS_PART: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    token = tl.load(token_ids_ptr + index).to(tl.int64)
    if token < 0:
        token = tl.load(sampled_ptr - 1 - token)
        token = tl.maximum(token, 0)  # where there was none to sample, of a row that has ended
    mask = cols < n
    if HAS_PART:
        token -= first_token
        mask &= (token >= 0) & (token < num_tokens)
    vector = tl.load(weight_ptr + token * n + cols, mask=mask, other=0.0)
    tl.store(out_ptr + index * n + cols, vector, mask=cols < n)
