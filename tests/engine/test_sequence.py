"""One request on its way: what it has, and what is to be done with its logits."""

from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence, SequenceStatus

PROMPT = [7, 5, 7, 6]
MAX_LEN = 20


def sequence(**options: Any) -> Sequence:
    return Sequence(3, PROMPT, SamplingParams(**options), MAX_LEN, seed=0)


def test_tokens_of_the_prompt_and_those_that_follow():
    prompt = list(PROMPT)
    seq = Sequence(3, prompt, SamplingParams(), MAX_LEN, seed=0)
    seq.token_ids += [8, 9]
    seq.num_pending_tokens = 1
    assert prompt == PROMPT, "the caller's list is its own"
    assert (seq.prompt_token_ids, seq.output_token_ids) == (PROMPT, [8, 9])
    assert (seq.num_prompt_tokens, seq.num_tokens) == (4, 7), "pending tokens count"
    assert seq.distinct_prompt_tokens.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("options", "until"),
    [
        ({}, 0), ({"temperature": 0}, 0), ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, 0),
        ({"stop_token_ids": [1], "stop": "t1", "seed": 3, "n": 2}, 0),
        ({"logprobs": 0}, MAX_LEN), ({"presence_penalty": 1}, MAX_LEN),
        ({"frequency_penalty": -1}, MAX_LEN), ({"repetition_penalty": 1.1}, MAX_LEN),
        ({"logit_bias": {1: 2.0}}, MAX_LEN), ({"allowed_token_ids": [1]}, MAX_LEN),
        ({"logit_bias": {}}, 0), ({"prompt_logprobs": 0}, 4), ({"min_tokens": 5}, 8),
        ({"min_tokens": 5, "logprobs": 1}, MAX_LEN),
    ],
    ids=str,
)  # fmt: skip
def test_its_logits_are_needed_for_no_longer_than_that(options: dict[str, Any], until: int):
    """A step that starts before so many tokens cannot only sample."""
    assert sequence(**options).logits_until == until


def test_the_log_probabilities_of_its_prompt_are_missed_until_all_are_there():
    seq = sequence(prompt_logprobs=1)
    assert seq.prompt_logprobs == [None], "nothing comes before the first token"
    for _ in PROMPT[1:]:
        assert seq.misses_prompt_logprobs
        seq.prompt_logprobs.append({})
    assert not seq.misses_prompt_logprobs
    assert not sequence().misses_prompt_logprobs


@pytest.mark.parametrize(
    ("reason", "stop_reason", "by_token"),
    [("stop", None, True), ("stop", 5, True), ("stop", "t5", False), ("length", None, False)],
)
def test_it_is_known_whether_a_token_ended_it(
    reason: str, stop_reason: int | str | None, by_token: bool
):
    seq = sequence()
    assert not seq.is_finished and not seq.ended_by_token
    seq.status = SequenceStatus.FINISHED
    seq.finish_reason, seq.stop_reason = reason, stop_reason
    assert seq.is_finished
    assert seq.ended_by_token == by_token
