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
    seq.token_ids.extend([8, 9])
    seq.num_pending_tokens = 1
    assert prompt == PROMPT, "the caller's list is its own"
    assert (seq.prompt_token_ids, seq.output_token_ids) == (PROMPT, [8, 9])
    assert (seq.num_prompt_tokens, seq.num_tokens) == (4, 7), "pending tokens count"
    assert seq.num_generated == 2


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, []), ({"temperature": 0}, []), ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, []),
        ({"stop_token_ids": [1], "stop": "t1", "seed": 3, "n": 2}, []), ({"logprobs": 0}, []),
        ({"presence_penalty": 1}, [0, 1, 2, 3]), ({"frequency_penalty": -1}, [0, 1, 2, 3]),
        ({"repetition_penalty": 1.1}, [0, 1, 2, 3]), ({"logit_bias": {1: 2.0}}, [0, 1, 2, 3]),
        ({"allowed_token_ids": [1]}, [0, 1, 2, 3]), ({"logit_bias": {}}, []),
        ({"prompt_logprobs": 0}, []), ({"min_tokens": 2}, [0, 1]),
        ({"min_tokens": 2, "logit_bias": {1: 2.0}}, [0, 1, 2, 3]),
    ],
    ids=str,
)  # fmt: skip
def test_its_logits_are_edited_in_these_steps_only(options: dict[str, Any], steps: list[int]):
    """Which of its first four tokens are sampled from edited logits."""
    edits = sequence(**options).sampling.edits
    assert [n for n in range(4) if edits is not None and edits.apply_to(n)] == steps


def test_what_a_step_does_for_its_row_is_known_from_the_start():
    sampling = sequence(
        temperature=1e-7, top_k=2**40, top_p=0.5, min_p=0.25, logprobs=3, max_tokens=2
    ).sampling
    assert (sampling.temperature, sampling.top_k) == (0.0, 2**31 - 1), "greedy; an int32"
    assert (sampling.top_p, sampling.min_p, sampling.logprobs) == (0.5, 0.25, 3)
    assert not sampling.truncates, "greedy takes the best token anyway"
    assert sequence(top_p=0.5).sampling.truncates


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_tokens_that_end_it_and_those_withheld_before_min_tokens(ignore_eos: bool):
    params = SamplingParams(stop_token_ids=[4], ignore_eos=ignore_eos, min_tokens=1)
    seq = Sequence(3, PROMPT, params, MAX_LEN, seed=0, eos_token_ids={8, 9})
    assert seq.eos_token_ids == (set() if ignore_eos else {8, 9})
    assert seq.ending_token_ids == ({4} if ignore_eos else {4, 8, 9})
    assert seq.sampling.edits.withheld == {4, 8, 9}, "EOS, too, where it would be ignored"


def test_the_log_probabilities_of_its_prompt_are_needed_until_all_are_there():
    seq = sequence(prompt_logprobs=1)
    assert seq.prompt_logprobs == [None], "nothing comes before the first token"
    for _ in PROMPT[1:]:
        assert seq.needs_prompt_logprobs
        seq.prompt_logprobs.append({})
    assert not seq.needs_prompt_logprobs
    assert not sequence().needs_prompt_logprobs


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
