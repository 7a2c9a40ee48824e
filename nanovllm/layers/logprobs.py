"""How likely tokens are, for who asks for log probabilities."""

from typing import NamedTuple

import torch

from nanovllm.utils.kernels import has_kernels, kernels


class Logprobs(NamedTuple):
    """Of some positions: the token that is there, and the most likely ones."""

    logprobs: torch.Tensor  # [positions] float32
    ranks: torch.Tensor  # [positions], 1 for what greedy decoding takes
    top_token_ids: torch.Tensor  # [positions, k]
    top_logprobs: torch.Tensor  # [positions, k], falling


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    """Log probabilities of `token_ids` [positions] int64 under `logits` [positions, vocab].

    They lie on the host, on a GPU once its stream has come so far.
    """
    k = min(k, logits.shape[1])
    on_kernels = has_kernels(logits) and k <= kernels.MOST_TOP
    found = (kernels.token_logprobs if on_kernels else token_logprobs)(logits, token_ids, k)
    return Logprobs(*(piece.to("cpu", non_blocking=True) for piece in found))


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.token_logprobs`."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    score = logits.gather(1, token_ids[:, None])
    tokens = torch.arange(logits.shape[1], device=logits.device)
    is_before = (logits > score) | ((logits == score) & (tokens < token_ids[:, None]))
    ranks = is_before.sum(dim=1) + 1
    top_logprobs, top_token_ids = logprobs.topk(k, dim=1)
    return own[:, 0], ranks, top_token_ids, top_logprobs
