"""Tokens and seconds of the steps."""

import time
from pathlib import Path

import pytest

from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, build
from nanovllm import LLM


@pytest.fixture
def llm(tiny: Path):
    with build(tiny) as engine:
        yield engine


@BOTH_ORDERS
def test_stats_count_every_token_run(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.stats.prefill_tokens == sum(map(len, PROMPTS))
        assert llm.stats.decode_tokens == 4 * (GREEDY.max_tokens - 1)
        assert llm.stats.prefill_seconds > 0 and llm.stats.decode_seconds > 0


def test_time_between_calls_is_not_counted(llm: LLM):
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    before = llm.stats.prefill_seconds + llm.stats.decode_seconds
    time.sleep(0.5)
    start = time.perf_counter()
    llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    spent = time.perf_counter() - start
    assert llm.stats.prefill_seconds + llm.stats.decode_seconds - before <= spent


@BOTH_ORDERS
def test_time_after_the_last_request_was_aborted_is_not_counted(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        request_id = llm.add_request(PROMPTS[0], GREEDY)
        llm.step()
        llm.abort(request_id)
        assert llm.is_finished()
        time.sleep(0.3)
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
        assert llm.stats.prefill_seconds + llm.stats.decode_seconds < 0.3
