"""Likelihoods, row by row, against formulas written out here."""

import pytest
import torch

from nanovllm.layers.logprobs import compute_logprobs


def test_log_probabilities_ranks_and_the_most_likely():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    found = compute_logprobs(logits, torch.tensor([3, 4]), k=2)
    expected = logits.double().log_softmax(dim=1)
    assert found.logprobs.tolist() == pytest.approx([expected[0, 3].item(), expected[1, 4].item()])
    assert found.ranks.tolist() == [2, 5], "of equally likely tokens the lowest id comes first"
    assert set(found.top_token_ids[0].tolist()) == {1, 3}
    assert found.top_token_ids[1].tolist() == [0, 1]
    best = [[expected[0, 1].item()] * 2, expected[1, :2].tolist()]
    torch.testing.assert_close(found.top_logprobs, torch.tensor(best))


@pytest.mark.parametrize(("k", "columns"), [(0, 0), (5, 5), (50, 5)])
def test_no_more_than_the_vocabulary_is_most_likely(k: int, columns: int):
    found = compute_logprobs(torch.zeros(3, 5), torch.tensor([0, 2, 4]), k)
    assert found.top_token_ids.shape == found.top_logprobs.shape == (3, columns)
    assert found.ranks.tolist() == [1, 3, 5]


def test_half_precision_is_widened_first():
    logits = (torch.arange(1000) % 7).half()[None]
    found = compute_logprobs(logits, torch.tensor([3]), k=0)
    assert found.logprobs.dtype == torch.float32
    assert found.logprobs.item() == pytest.approx(logits.double().log_softmax(1)[0, 3].item())
