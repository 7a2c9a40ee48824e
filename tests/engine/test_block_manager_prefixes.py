"""The prefix cache in a whole engine: what is found again, and what must not be."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.blocks import assert_blocks_consistent
from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, build, greedy
from nanovllm import SamplingParams
from nanovllm.engine.step_inputs import StepInputs

BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=20)


# A prompt that is wholly in the cache leaving no token to run


@BOTH_ORDERS
@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK, 2 * BLOCK + 1])
def test_prompt_wholly_in_the_cache_still_runs_a_token(
    tiny: Path, tiny_reference: Reference, length: int, async_scheduling: bool
):
    prompt = random_tokens(length, seed=5)
    with build(tiny, async_scheduling=async_scheduling) as llm:
        greedy(llm, [random_tokens(3 * BLOCK, seed=5)])  # the prompt and more
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(prompt, 20)
        assert output["num_cached_tokens"] == (length - 1) // BLOCK * BLOCK


# A stale hash pointing at a reused block


def test_reused_block_is_not_found_under_its_old_hash(tiny: Path, tiny_reference: Reference):
    """The cache is overwritten whole; then the first prompt comes again."""
    first, second = random_tokens(3 * BLOCK, seed=1), random_tokens(3 * BLOCK, seed=2)
    with build(tiny, num_kvcache_blocks=5, max_model_len=5 * BLOCK) as llm:
        for prompt in (first, second, first, second):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)
            assert output["num_cached_tokens"] == 0


def test_half_reused_prefix_is_found_up_to_the_first_lost_block(
    tiny: Path, tiny_reference: Reference
):
    first, second = random_tokens(3 * BLOCK + 1, seed=1), random_tokens(4, seed=2)
    with build(tiny, num_kvcache_blocks=6, max_model_len=6 * BLOCK) as llm:
        # Of 6 blocks the first prompt fills 3 and its answer 1; the second needs 2 + 1.
        for prompt in (first, second, random_tokens(BLOCK, seed=3), first):
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)
        assert 0 < output["num_cached_tokens"] < 3 * BLOCK


# Two equal prompts admitted in one step


@BOTH_ORDERS
def test_two_equal_prompts_in_one_step_share_their_full_blocks(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    prompt = random_tokens(2 * BLOCK + 3, seed=4)
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for _ in range(2):
            llm.add_request(prompt, GREEDY)
        first, second = llm.scheduler.waiting
        outputs = llm.step()
        assert first.block_table[:2] == second.block_table[:2]
        assert first.block_table[2] != second.block_table[2]
        blocks = llm.scheduler.block_manager.blocks
        assert [blocks[i].ref_count for i in first.block_table] == [2, 2, 1]
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["num_cached_tokens"] for output in outputs] == [0, 2 * BLOCK]
        for output in outputs:
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)


def test_equal_prompts_of_exactly_full_blocks_do_not_share_the_last(
    tiny: Path, tiny_reference: Reference
):
    prompt = random_tokens(2 * BLOCK, seed=4)
    with build(tiny) as llm:
        outputs = llm.generate([prompt] * 3, GREEDY, use_tqdm=False)
        assert [output["num_cached_tokens"] for output in outputs] == [0, BLOCK, BLOCK]
        for output in outputs:
            assert output["token_ids"] == tiny_reference.tokens(prompt, 20)


@BOTH_ORDERS
@pytest.mark.parametrize("budget", [16384, 20])
def test_completions_share_a_full_last_block_and_store_nothing_there(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool, budget: int
):
    prompt = random_tokens(2 * BLOCK, seed=4)
    options = {"async_scheduling": async_scheduling, "max_num_batched_tokens": budget}
    with build(tiny, **options) as llm:
        manager, inputs, stored = llm.scheduler.block_manager, llm.model_runner.inputs, []
        fill = inputs.fill

        def recorded(batch, *args):
            shape, num_words = fill(batch, *args)
            host = inputs.hosts[inputs.buffer_index].numpy()
            stored.append(StepInputs.views(host, shape).slot_mapping[: batch.num_tokens].tolist())
            return shape, num_words

        inputs.fill = recorded
        (output,) = llm.generate(prompt, replace(GREEDY, n=4), use_tqdm=False)
        assert output["num_cached_tokens"] == 0
        for completion in output["outputs"]:
            assert completion["token_ids"] == tiny_reference.tokens(prompt, 20)
        # Each slot of the prompt is written once; three last tokens are run and not stored.
        slots = [slot for step in stored for slot in step]
        assert slots.count(-1) == 3
        assert len(set(slots) - {-1}) == len(slots) - 3
        assert_blocks_consistent(manager, [])
