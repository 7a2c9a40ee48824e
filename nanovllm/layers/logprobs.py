"""How likely tokens are, for who asks for log probabilities."""

from typing import NamedTuple

import torch


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
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    score = logits.gather(1, token_ids[:, None])
    tokens = torch.arange(logits.shape[1], device=logits.device)
    is_before = (logits > score) | ((logits == score) & (tokens < token_ids[:, None]))
    ranks = is_before.sum(dim=1) + 1
    top_logprobs, top_token_ids = logprobs.topk(min(k, logits.shape[1]), dim=1)
    found = (own[:, 0], ranks, top_token_ids, top_logprobs)
    return Logprobs(*(piece.to("cpu", non_blocking=True) for piece in found))
