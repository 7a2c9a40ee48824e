"""Sampling: one token a row, by temperature, top-k, top-p and min-p.

Sampling is Gumbel-max (see arXiv:2110.01515): the token with the highest logits / temperature + g,
g being standard Gumbel noise, which draws from the softmax without computing it. The noise comes
from Philox-4x32-10 (Salmon et al. 2011), keyed by the request's seed with (token id, position) as
the counter, so that a token depends on nothing but its own request.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.layers.edit_tables import EditTables, RowEdits
from nanovllm.layers.logprobs import Logprobs, compute_logprobs
from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.memory import to_device

LOGPROB_ROWS = 128  # rows whose log probabilities are computed at a time: float32 takes much room
MAX_NOISE = 23.0  # of the largest number u that 32 bits give, 1 - 2^-33: -log(-log(u)) is 22.9
# Philox makes four numbers at a counter: token i of a tile has number i // (_TILE / 4) of counter
# i % (_TILE / 4). Token 5000, say, is token 904 of the second tile, and has number 0.
_TILE = 4096
_MASK32 = 0xFFFFFFFF
# In place of a token: the logits of a row have NaN or infinity, or they are all -inf.
NOT_FINITE, NONE_LEFT = -1, -2


class SamplingInputs(NamedTuple):
    """How the rows of a step are sampled, on the device.

    Attributes:
        temperatures: [rows] float32; 0 takes the most likely token.
        seeds: [rows] int64, one per request.
        positions: [rows] int32, the position in its sequence of the token being sampled.
        top_k: [rows] int32; 0, or vocab and more, is off.
        top_p: [rows] float32 in (0, 1]; 1 is off.
        min_p: [rows] float32 in [0, 1]; 0 is off.
        truncates: whether any row has one of these three on; if not, they are not read.
        edits: None if no row has its logits changed first.
        buffer_index: [1] int32, which of the host's token buffers is written.
    """

    temperatures: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    truncates: bool
    edits: RowEdits | None
    buffer_index: torch.Tensor

    def of_rows(self, rows: torch.Tensor | slice) -> "SamplingInputs":
        """Of some of the rows, [any number] int64; `edits` stay as they are."""
        names = ["temperatures", "seeds", "positions"]
        names += ["top_k", "top_p", "min_p"] if self.truncates else []
        return self._replace(**{name: getattr(self, name)[rows] for name in names})


class Sampler:
    """Chooses each row's token, and keeps it where the next step and the host find it.

    Args:
        max_rows: of a step.
        device: of the logits.
        vocab_size: of the model.
        here: the tokens whose logits are here; None: all.

    Attributes:
        edits: what requests change in their logits.
        tokens: [max_rows] int64, on the device: what the last step sampled.
        host_tokens: [2, max_rows] int64: the same on the host, in two buffers taken in turns, since
            the host may not have read the step before. `NOT_FINITE` or `NONE_LEFT` stand where
            there was no token to sample.
    """

    def __init__(
        self, max_rows: int, device: torch.device, vocab_size: int, here: slice | None = None
    ) -> None:
        on_gpu = device.type == "cuda"
        here = slice(0, vocab_size) if here is None else here
        width = here.stop - here.start
        self.edits = EditTables(max_rows, device, width, here.start, vocab_size)
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.host_tokens = torch.zeros(2, max_rows, dtype=torch.int64, pin_memory=on_gpu)

    def sample(self, logits: torch.Tensor, inputs: SamplingInputs) -> None:
        """Sample a token for each row of `logits` [rows, vocab]."""
        if inputs.edits is not None:
            logits = self.edits.edited(logits, inputs.edits, self.tokens)
        out = self.tokens[: len(logits)]
        thresholds = self.thresholds(logits, inputs) if inputs.truncates else None
        if has_kernels(logits):
            kernels.gumbel_sample(
                logits, inputs.temperatures, inputs.seeds, inputs.positions, out,
                self.host_tokens, inputs.buffer_index, thresholds,
            )  # fmt: skip
        else:
            gumbel_sample(
                logits, inputs.temperatures, inputs.seeds, inputs.positions, out, thresholds
            )
            self.host_tokens[int(inputs.buffer_index), : len(out)] = out

    def sample_again(
        self, logits: torch.Tensor, inputs: SamplingInputs, rows: torch.Tensor
    ) -> None:
        """Sample some rows of a step once more. The host's copies of all its tokens are then
        out of date.

        Args:
            logits: [these rows, vocab].
            inputs: of these rows.
            rows: [these rows] int64, where they are in the step.
        """
        tokens = self.tokens.clone()
        self.sample(logits, inputs)  # which takes them for the first rows
        self.tokens.copy_(tokens.index_copy_(0, rows, self.tokens[: len(rows)]))

    def logprobs(
        self, logits: torch.Tensor, rows: list[int], k: int
    ) -> list[tuple[list[int], Logprobs]]:
        """Log probabilities of the tokens just sampled in some rows, and of the k most likely ones,
        in pieces: (rows, what was found of them)."""
        found = []
        for start in range(0, len(rows), LOGPROB_ROWS):
            piece = rows[start : start + LOGPROB_ROWS]
            places = to_device(piece, logits.device)
            token_ids = self.tokens[places].clamp_(min=0)  # there may have been none to sample
            found.append((piece, self.logprobs_of(logits[places], token_ids, k)))
        return found

    def logprobs_of(self, logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Logprobs:
        """See `compute_logprobs`."""
        return compute_logprobs(self.whole(logits), token_ids, k)

    # What one rank of several does in another way: see `parallel.sampler`.

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of all tokens, [rows, vocab], whichever of them are here."""
        return logits

    def thresholds(self, logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
        """See `truncation_thresholds`."""
        return row_thresholds(logits, inputs)


def row_thresholds(logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
    """See `truncation_thresholds`."""
    args = (logits, inputs.temperatures, inputs.top_k, inputs.top_p, inputs.min_p)
    if has_kernels(logits):
        return kernels.truncation_thresholds(*args)
    return truncation_thresholds(*args)


def truncation_thresholds(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """[rows] float32: a row keeps the tokens whose logit is at least this; see
    `kernels.truncation_thresholds`."""
    rows, vocab = logits.shape
    thresholds = torch.full((rows,), float("-inf"), dtype=torch.float32, device=logits.device)
    has_k = (top_k > 0) & (top_k < vocab)
    is_on = (temperatures > 0) & (has_k | (top_p < 1) | (min_p > 0))
    for row in is_on.nonzero().flatten().tolist():
        x, temperature, p = logits[row].float(), temperatures[row], top_p[row]
        x = x.where(x == x, float("-inf"))  # NaN, of a model that is broken
        peak = x.max()
        threshold = peak + temperature * min_p[row].log()  # -inf where min_p is 0
        if has_k[row]:
            threshold = torch.maximum(threshold, x.topk(int(top_k[row])).values[-1])
        if p < 1 and peak > float("-inf"):
            x = x[x >= threshold]
            total = ((x - peak) / temperature).exp().sum(dtype=torch.float64).float()
            # Tokens below `tail` have together less than half of what may be cut: no need to sort.
            tail = peak + temperature * ((1 - p) / (2 * vocab)).log()
            ordered = x[x >= tail].sort(descending=True).values
            weights = ((ordered - peak) / temperature).exp()
            sums = weights.cumsum(0, dtype=torch.float64).float()
            threshold = ordered[(sums < p * total).sum()]
        thresholds[row] = threshold
    return thresholds


def gumbel_sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> None:
    """One token a row into `out` [rows] int64; see `kernels.gumbel_sample`."""
    out.copy_(gumbel_winners(logits, temperatures, seeds, positions, thresholds)[1])


def gumbel_winners(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    first_token: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest score of each row, noise included, [rows] float32, and its token, [rows] int64:
    infinity and `NOT_FINITE` for a row with NaN or infinity, -inf and `NONE_LEFT` if all are -inf.

    `logits` are of consecutive tokens from `first_token` on.
    """
    best = logits.max(dim=-1)  # the first of equals, as argmax; faster on a CPU
    scores, tokens = best.values.float(), best.indices + first_token
    is_finite = scores < float("inf")  # the largest of any with NaN is NaN
    tokens[scores == float("-inf")] = NONE_LEFT
    tokens[~is_finite] = NOT_FINITE
    scores[~is_finite] = float("inf")
    for row in ((temperatures > 0) & (tokens >= 0)).nonzero().flatten().tolist():
        threshold = float("-inf") if thresholds is None else thresholds[row]
        own = logits[row].float()
        own = own.where(own >= threshold, float("-inf"))
        scores[row], tokens[row] = _winner(
            own / temperatures[row], seeds[row], positions[row], first_token
        )
    return scores, tokens


def _winner(
    scores: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, first_token: int
) -> tuple[torch.Tensor, torch.Tensor | int]:
    """The highest sum of `scores` [tokens], from `first_token` on, and noise; and its token.

    No noise exceeds MAX_NOISE. So once the token with the highest score has its noise, a token more
    than MAX_NOISE below that sum cannot win, and needs none drawn.
    """
    first_tile, before = divmod(first_token, _TILE)  # of the first tile, `before` are not here
    after = -(before + len(scores)) % _TILE
    tiles = F.pad(scores, (before, after), value=float("-inf")).view(-1, 4, _TILE // 4)
    by_counter = tiles.transpose(0, 1).flatten(1)
    best, first_counter = by_counter.amax(dim=0), first_tile * (_TILE // 4)
    leader = best.argmax(dim=0, keepdim=True)
    noise = gumbel_noise(seed, position, first_counter + leader)
    to_beat = (by_counter[:, leader] + noise).max()
    counters = (best >= to_beat - MAX_NOISE).nonzero().flatten()
    noisy = by_counter[:, counters] + gumbel_noise(seed, position, first_counter + counters)
    stream, index = (noisy == noisy.max()).nonzero().unbind(1)
    tile, place = counters[index] // (_TILE // 4), counters[index] % (_TILE // 4)
    tokens = (first_tile + tile) * _TILE + stream * (_TILE // 4) + place
    return noisy.max(), tokens.min()


def gumbel_noise(
    seed: torch.Tensor, position: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    """[4, counters] float32 standard Gumbel numbers, at most `MAX_NOISE`: the four that Philox
    makes at each of `counters` [counters] int64. `seed` and `position` are 0-d integers."""
    bits = _philox(seed, counters, position.to(torch.int64))
    u = bits.float().add_(0.5).mul_(2.0**-32)
    series = u * (1 + u * (0.5 + u * (1 / 3)))  # in float32, 1 - u would be 1 for small u
    exponential = torch.where(u < 1e-3, series, -torch.log(1 - u))
    return exponential.log_().neg_()


def _philox(seed: torch.Tensor, counter0: torch.Tensor, counter1: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10 with counters (counter0, counter1, 0, 0): [4, n] int64 of 32 bits each."""
    c0, c1 = counter0, (counter1 & _MASK32).expand_as(counter0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product2 >> 32) & _MASK32) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = product2 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3))
