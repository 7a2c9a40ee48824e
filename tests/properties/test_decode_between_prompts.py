"""Requests that decode between the chunks of a long prompt, and take the blocks it has: what comes
out is what each gives alone."""

from pathlib import Path

import pytest

from helpers.checkpoints import random_tokens
from helpers.engines import BOTH_ORDERS, assert_empty, build
from nanovllm import SamplingParams

OLD = random_tokens(15, seed=1), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
NEW = random_tokens(100, seed=2)
WISHES = {
    "plain": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 3},
    "prompt-logprobs": {"temperature": 0, "prompt_logprobs": 1, "logprobs": 1},
    "penalties": {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.5, "min_tokens": 4},
}


@BOTH_ORDERS
@pytest.mark.parametrize("wishes", WISHES.values(), ids=WISHES)
def test_same_when_preempted_in_the_middle_of_a_prompt(
    tiny: Path, wishes: dict, async_scheduling: bool
):
    params = [OLD[1], SamplingParams(max_tokens=8, ignore_eos=True, **wishes)]
    alone = []
    for prompt, param in zip((OLD[0], NEW), params, strict=True):
        with build(tiny) as llm:
            alone += llm.generate([prompt], [param], use_tqdm=False)
    with build(
        tiny, num_kvcache_blocks=9, max_num_batched_tokens=4, async_scheduling=async_scheduling
    ) as llm:
        ids = [llm.add_request(OLD[0], params[0]), llm.add_request(NEW, params[1])]
        found = {}
        while not llm.is_finished():
            was_preempted = llm.scheduler.num_preemptions > 0
            found.update({output["request_id"]: output for output in llm.step()})
            if llm.scheduler.num_preemptions and not was_preempted:
                (preempted,) = llm.scheduler.waiting
                assert preempted.prompt_token_ids == NEW and preempted.num_generated == 0
        assert llm.scheduler.num_preemptions > 0, "the test does not test what it says"
        for request_id, expected in zip(ids, alone, strict=True):
            output = found[request_id]
            assert output["token_ids"] == expected["token_ids"]
            for key in ("prompt_logprobs", "logprobs"):
                assert _numbers(output[key]) == pytest.approx(_numbers(expected[key]), abs=1e-4)
        assert_empty(llm)


def _numbers(positions: list | None) -> list[float]:
    """Token ids and log probabilities, one after the other."""
    entries = [item for one in positions or [] for item in (one or {}).items()]
    return [number for token_id, entry in entries for number in (token_id, entry.logprob)]
