"""The two ends of the model."""

import torch

from helpers.kernel_inputs import relative_error, rms_norm_float64
from nanovllm.layers.deferred import Stream
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm


def test_a_negative_id_stands_for_a_token_of_the_step_before():
    embedding = Embedding(10, 4).requires_grad_(False)
    torch.nn.init.normal_(embedding.weight)
    token_ids = torch.tensor([3, -1, -3, 0], dtype=torch.int32)
    found = embedding(token_ids, torch.tensor([7, 8, 9]))
    assert torch.equal(found, embedding.weight[[3, 7, 9, 0]])


def test_the_head_scores_the_normalised_stream():
    generator = torch.Generator().manual_seed(0)
    head, norm = LMHead(16, 50).requires_grad_(False), RMSNorm(16, 1e-6).requires_grad_(False)
    for weight in (head.weight, norm.weight):
        torch.nn.init.normal_(weight, generator=generator)
    x = torch.randn(3, 16, generator=generator)
    logits = head(norm(Stream(x.clone()))).values()
    assert logits.shape == (3, 50)
    expected = rms_norm_float64(x, norm.weight, 1e-6) @ head.weight.double().T
    assert relative_error(logits, expected) < 1e-5
