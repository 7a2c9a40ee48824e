"""A token for each row, where a rank has the logits of a part of the vocabulary.

Each rank finds the best of its own tokens; the best of the ranks' winners is the token of the row,
and no logits travel. A winner travels as one integer, `winner_keys`, whose order is that of scores,
and of falling token ids among equal ones. For top-k, top-p and min-p each rank gets the whole
logits of a share of the rows, finds their thresholds, and tells the others. Rows whose log
probabilities are wanted are put together on each rank.
"""

import torch

from nanovllm.layers.sampler import Sampler, SamplingInputs, gumbel_winners, row_thresholds
from nanovllm.parallel.group import Group
from nanovllm.parallel.sharding import vocab_part
from nanovllm.utils.kernels import has_kernels, kernels

_LOW = 0xFFFFFFFF


class ParallelSampler(Sampler):
    """See `Sampler`. All logits given to it, but for those that it puts together, are this rank's.

    Args:
        vocab_size: of the model.
    """

    def __init__(self, max_rows: int, device: torch.device, vocab_size: int, group: Group) -> None:
        parts = [vocab_part(vocab_size, rank, group.size) for rank in range(group.size)]
        super().__init__(max_rows, device, vocab_size, parts[group.rank])
        self.group = group
        self._first_token = parts[group.rank].start
        self._widths = [part.stop - part.start for part in parts]

    def sample(self, logits: torch.Tensor, inputs: SamplingInputs) -> None:
        """Sample a token for each row of `logits` [rows, tokens of this rank]."""
        if inputs.edits is not None:
            logits = self.edits.edited(logits, inputs.edits, self.tokens)
        out = self.tokens[: len(logits)]
        thresholds = self.thresholds(logits, inputs) if inputs.truncates else None
        args = (logits, inputs.temperatures, inputs.seeds, inputs.positions)
        if has_kernels(logits):
            keys, peers = kernels.gumbel_winners(*args, thresholds, self._first_token), None
            if self.group.winner_peers is not None:
                peers = self.group.winner_peers
            else:
                self.group.all_reduce_max(keys)
            kernels.best_of_ranks(keys, peers, out, self.host_tokens, inputs.buffer_index)
        else:
            keys = winner_keys(*gumbel_winners(*args, thresholds, self._first_token))
            out.copy_(token_of_key(self.group.all_reduce_max(keys)))
            self.host_tokens[int(inputs.buffer_index), : len(out)] = out

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocab]: the parts of all ranks put together."""
        parts = self.group.all_gather(self._padded(logits))
        return torch.cat([part[:, :n] for part, n in zip(parts, self._widths, strict=True)], dim=1)

    def thresholds(self, logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
        """[rows]; see `truncation_thresholds`."""
        size, rows = self.group.size, len(logits)
        share = -(-rows // size)
        padded = self._padded(logits)
        if share * size > rows:
            padded = torch.cat([padded, padded[:1].expand(share * size - rows, -1)])
        parts = self.group.all_to_all(padded.view(size, share, -1))
        own = torch.cat([part[:, :n] for part, n in zip(parts, self._widths, strict=True)], dim=1)
        start = self.group.rank * share
        rows_here = torch.arange(start, start + share, device=logits.device).clamp_(max=rows - 1)
        found = row_thresholds(own, inputs.of_rows(rows_here))
        return self.group.all_gather(found).flatten()[:rows]

    def _padded(self, logits: torch.Tensor) -> torch.Tensor:
        """As wide as the widest rank's."""
        missing = max(self._widths) - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing)) if missing else logits


def winner_keys(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[rows] int64 of scores [rows] float32 and tokens [rows] int64: the largest is the winner, and
    of equal scores the one of the lowest token."""
    bits = (scores + 0.0).view(torch.int32).long()  # no -0.0, which would be below 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | torch.where(tokens < 0, -1 - tokens, _LOW - tokens)


def token_of_key(keys: torch.Tensor) -> torch.Tensor:
    low = keys & _LOW
    return torch.where(low < 2, -1 - low, _LOW - low)  # 0 and 1 stand for no token
