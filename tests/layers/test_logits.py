"""Changes of the logits, and likelihoods, row by row, against formulas written out here."""

import math
from typing import Any

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.layers.logits import RowEdits, compute_logprobs, edit_logits_
from nanovllm.sampling_params import LogitEdits

VOCAB = 10
ENDING = frozenset([8, 9])
INF = math.inf


def edits(prompt: list[int], generated: list[int], **options: Any) -> RowEdits:
    found = LogitEdits.of(SamplingParams(**options), ENDING, prompt)
    return RowEdits(found, 1.0, len(generated), generated)


def logits_of(rows: int) -> torch.Tensor:
    """-4 to 5 in each row, so that tokens 0 to 3 are below 0 and token 4 is at it."""
    return torch.arange(-4.0, 6.0).repeat(rows, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"allowed_token_ids": [0, 7]}, [-4] + [-INF] * 6 + [3] + [-INF] * 2),
        ({"min_tokens": 4}, [-4, -3, -2, -1, 0, 1, 2, 3, -INF, -INF]),
        ({"min_tokens": 3}, [-4, -3, -2, -1, 0, 1, 2, 3, 4, 5]),  # as many as there are
        ({"logit_bias": {0: 2.5, 9: -1000}}, [-1.5, -3, -2, -1, 0, 1, 2, 3, 4, -95]),
        ({"presence_penalty": 0.5}, [-4, -3, -2.5, -1, 0, 1, 2, 2.5, 4, 5]),
        ({"frequency_penalty": 0.5}, [-4, -3, -2.5, -1, 0, 1, 2, 2, 4, 5]),
        ({"repetition_penalty": 2.0}, [-4, -6, -4, -1, 0, 1, 1, 1.5, 4, 5]),
        # Everything at once: bias, then division or multiplication, then what is taken off.
        (
            {
                "logit_bias": {2: 4.0, 6: -3}, "repetition_penalty": 2.0,
                "presence_penalty": 1, "frequency_penalty": 0.25,
                "allowed_token_ids": [1, 2, 6, 7, 9], "min_tokens": 4,
            },
            [-INF, -6, 1 - 1.25, -INF, -INF, -INF, -2, 1.5 - 1.5, -INF, -INF],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_each_option_does_to_a_row(options: dict[str, Any], expected: list[float]):
    """After the prompt 1, 6, 6 came 7, 2, 7."""
    logits = logits_of(1)
    edit_logits_(logits, [edits([1, 6, 6], [7, 2, 7], **options)])
    assert logits[0].tolist() == pytest.approx(expected)


def test_rows_with_other_wishes_do_not_meet():
    wishes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5, "presence_penalty": 1}, {"logit_bias": {3: 7.0}},
        {"allowed_token_ids": [2, 3]}, {"frequency_penalty": 2}, {"min_tokens": 9},
    ]  # fmt: skip
    histories = [([1, 2], [3]), ([4], [5, 5]), ([6], []), ([7], [7, 7, 8]), ([0], [9])]
    together, alone = logits_of(len(wishes)), logits_of(len(wishes))
    rows = [edits(*history, **options) for history, options in zip(histories, wishes, strict=True)]
    edit_logits_(together, rows)
    for index, row in enumerate(rows):
        edit_logits_(alone[index : index + 1], [row])
    assert torch.equal(together, alone)


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
