"""The two ends of the model: token embedding and output head, tied or not."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers.linear import Linear


class Embedding(nn.Module):
    """Token ids [tokens] -> vectors [tokens, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class LMHead(Linear):
    """Vectors [rows, hidden] -> logits [rows, vocab]. Its weight may be the embedding's."""
