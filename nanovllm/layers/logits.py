"""What a request may want of the logits besides a token: changes before, likelihoods after."""

from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.sampling_params import LogitEdits
from nanovllm.utils.memory import to_device


class RowEdits(NamedTuple):
    """The edits of one row in one step, and the temperature that it is sampled with.

    `generated` are the `num_generated` tokens that its request has generated; without penalties,
    which alone read them, it may be empty.
    """

    edits: LogitEdits
    temperature: float
    num_generated: int
    generated: list[int]


def edit_logits_(logits: torch.Tensor, edits: list[RowEdits]) -> None:
    """Change float32 logits, [rows, vocab], in place, without waiting for the device.

    The formulas of the penalties are OpenAI's (presence, frequency) and those of Keskar et al.
    2019, arXiv:1909.05858 (repetition).

    Args:
        edits: one for each row.
    """
    restricted: list[int] = []  # rows
    # Places in the flattened logits, row * vocab + token id, and what is done there.
    allowed: list[int] = []
    banned: list[int] = []
    biases: dict[int, float] = {}
    repeated: list[np.ndarray] = []
    divisors: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    for row, (edit, _, num_generated, generated) in enumerate(edits):
        first, params = row * logits.shape[1], edit.params
        if params.allowed_token_ids is not None:
            restricted.append(row)
            allowed += [first + token_id for token_id in params.allowed_token_ids]
        if params.is_below_min_tokens(num_generated):
            banned += [first + token_id for token_id in edit.withheld]
        for token_id, bias in (params.logit_bias or {}).items():
            biases[first + token_id] = bias
        if params.penalizes:
            tokens, times = np.unique(np.array(generated, dtype=np.int64), return_counts=True)
            counted.append(first + tokens)
            losses.append(params.frequency_penalty * times + params.presence_penalty)
            if params.repetition_penalty != 1:
                seen = first + np.union1d(edit.prompt, tokens)
                repeated.append(seen)
                divisors.append(np.full(len(seen), params.repetition_penalty))

    def sent(values: Any, dtype: type = np.int64) -> torch.Tensor:
        return to_device(values, logits.device, dtype)

    flat = logits.view(-1)
    if restricted:
        places = sent(allowed)
        kept = flat[places]
        logits.index_fill_(0, sent(restricted), float("-inf"))
        flat[places] = kept
    if banned:
        # By index_fill_, since an assignment would send its value, and wait for the device.
        flat.index_fill_(0, sent(banned), float("-inf"))
    if biases:
        flat[sent([*biases])] += sent([*biases.values()], np.float32)
    if repeated:
        places, divisor = sent(np.concatenate(repeated)), sent(np.concatenate(divisors), np.float32)
        values = flat[places]
        flat[places] = torch.where(values > 0, values / divisor, values * divisor)
    if counted:
        flat[sent(np.concatenate(counted))] -= sent(np.concatenate(losses), np.float32)


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
