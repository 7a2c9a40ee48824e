"""The two ends of a model: token embedding and output head."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.linear import Linear
from nanovllm.utils.kernels import has_kernels, kernels


class Embedding(nn.Module):
    """Token ids -> vectors."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden].

        Args:
            token_ids: [tokens] int32; -1 - i stands for `sampled[i]`.
            sampled: [rows] int64, the tokens that the previous step sampled.
        """
        if has_kernels(self.weight):
            return kernels.embed(token_ids, sampled, self.weight)
        return embed(token_ids, sampled, self.weight)


class LMHead(Linear):
    """The last product, whose values are the logits: a `Linear` by a name of its own. Its weight
    may be the embedding's."""


def embed(token_ids: torch.Tensor, sampled: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The formula in torch; see `Embedding.forward`."""
    newest = sampled[(-1 - token_ids).clamp_(min=0)]
    newest = newest.clamp(min=0)  # where there was none to sample, of a row that has ended
    return F.embedding(torch.where(token_ids < 0, newest, token_ids), weight)
