"""The two ends of the model: token embedding and output head, tied or not."""

import torch
from torch import nn

from nanovllm.kernels.embed import embed
from nanovllm.layers.linear import Linear


class Embedding(nn.Module):
    """Token ids [tokens] -> vectors [tokens, hidden]; -1 - i stands for the token `sampled[i]`."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        return embed(token_ids, sampled, self.weight)


class LMHead(Linear):
    """Residual stream, final norm -> logits [rows, vocab]. Its weight may be the embedding's."""
