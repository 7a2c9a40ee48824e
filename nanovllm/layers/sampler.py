"""From logits to the next token, and what else a request may want of them."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from nanovllm.kernels.gumbel_sample import gumbel_sample
from nanovllm.kernels.truncate import truncation_thresholds
from nanovllm.sampling_params import SamplingParams

Truncation = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # top_k, top_p, min_p: [rows] each


class Sampler(nn.Module):
    """Greedy and random rows side by side; see `nanovllm.kernels.gumbel_sample`."""

    def forward(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        copies: torch.Tensor,
        turn: torch.Tensor,
        truncation: Truncation | None = None,
    ) -> None:
        thresholds = None
        if truncation is not None:
            thresholds = truncation_thresholds(logits, temperatures, *truncation)
        gumbel_sample(logits, temperatures, seeds, positions, out, copies, turn, thresholds)


def edit_logits_(
    logits: torch.Tensor,
    params: SamplingParams,
    stop_token_ids: frozenset[int],
    prompt: list[int],
    generated: list[int],
    num_generated: int,
) -> None:
    """Change one row of float32 logits, [vocab], as a request asks for, in place.

    The formulas of the penalties are OpenAI's (presence, frequency) and those of Keskar et al.
    2019, arXiv:1909.05858 (repetition). `generated` need only be given where there are penalties.
    """
    device = logits.device

    def at(token_ids: list[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=device)

    if params.allowed_token_ids is not None:
        allowed = at(list(params.allowed_token_ids))
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    if num_generated < params.min_tokens and stop_token_ids:
        logits[at(list(stop_token_ids))] = float("-inf")
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), device=device)
        logits[at(list(params.logit_bias))] += biases
    if params.repetition_penalty != 1:
        seen = at(list({*prompt, *generated}))
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if generated and (params.frequency_penalty or params.presence_penalty):
        counts = Counter(generated)
        numbers = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)
        logits[at(list(counts))] -= params.frequency_penalty * numbers + params.presence_penalty


class Logprobs(NamedTuple):
    """Of some positions: the token that is there, and the most likely ones."""

    logprobs: torch.Tensor  # [positions] float32
    ranks: torch.Tensor  # [positions], 1 for the most likely token
    top_token_ids: torch.Tensor  # [positions, k]
    top_logprobs: torch.Tensor  # [positions, k], falling


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
    """Log probabilities of `token_ids` [positions] int64 under `logits` [positions, vocab]."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > own).sum(dim=1) + 1
    top_logprobs, top_token_ids = logprobs.topk(min(k, logits.shape[1]), dim=1)
    return Logprobs(own[:, 0], ranks, top_token_ids, top_logprobs)
