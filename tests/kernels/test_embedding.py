"""The embedding of tokens that the host knows, and of those that only the device knows."""

import pytest
import torch

from helpers.kernel_inputs import interpreted, normal
from nanovllm.kernels.embedding import embed as embed_triton
from nanovllm.layers.embed_head import embed as embed_torch

pytestmark = pytest.mark.usefixtures("poison")


def check_embed(function, device: str = "cpu") -> None:
    weight = normal(50, 96, dtype=torch.float16, device=device)
    token_ids = torch.tensor([7, -1, 49, 0, -3, -1, -4], dtype=torch.int32, device=device)
    # The second one is nobody's; in place of the fourth there was none to sample.
    sampled = torch.tensor([11, -9999, 48, -2], device=device)
    found = function(token_ids, sampled, weight)
    expected = weight[torch.tensor([7, 11, 49, 0, 48, 11], device=device)]
    assert torch.equal(found[:-1], expected) and found[-1].isfinite().all()


@interpreted
@pytest.mark.parametrize("function", [embed_triton, embed_torch])
def test_embed(function) -> None:
    check_embed(function)


@pytest.mark.gpu
def test_embed_gpu() -> None:
    check_embed(embed_triton, "cuda")
