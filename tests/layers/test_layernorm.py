"""The residual stream, whose newest part may still be in pieces, and the norm that adds them up."""

import pytest
import torch

from helpers.kernel_inputs import relative_error, rms_norm_float64
from nanovllm.layers.layernorm import Residual, RMSNorm


@pytest.fixture
def residual() -> Residual:
    generator = torch.Generator().manual_seed(0)
    return Residual(
        torch.randn(5, 32, generator=generator), torch.randn(3, 5, 32, generator=generator)
    )


def total(residual: Residual) -> torch.Tensor:
    return residual.x.double() + residual.partials.double().sum(dim=0)


def test_a_norm_adds_up_what_is_in_pieces(residual: Residual):
    norm = RMSNorm(32, 1e-3).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    expected = total(residual)
    y = norm(residual)
    assert relative_error(y, rms_norm_float64(expected, norm.weight, 1e-3)) < 1e-5
    assert residual.partials is None
    assert relative_error(residual.x, expected) < 1e-6
    assert torch.equal(norm(residual), y), "nothing is added twice"


@pytest.mark.parametrize("index", [slice(1, 4), torch.tensor([3, 0])], ids=["slice", "tensor"])
def test_rows_are_added_up_and_the_stream_is_left_as_it_was(
    residual: Residual, index: slice | torch.Tensor
):
    x, partials = residual.x.clone(), residual.partials.clone()
    found = residual.rows(index)
    assert found.partials is None
    assert relative_error(found.x, total(residual)[index]) < 1e-6
    assert torch.equal(residual.x, x) and torch.equal(residual.partials, partials)


def test_a_stream_in_pieces_is_not_cut(residual: Residual):
    with pytest.raises(AssertionError):
        residual.keep(torch.tensor([0]))
    whole = residual.rows(slice(None))
    expected = whole.x[[0, 4]]
    whole.keep(torch.tensor([0, 4]))
    assert torch.equal(whole.x, expected)
