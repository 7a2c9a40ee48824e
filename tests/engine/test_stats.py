"""Tokens and seconds of the steps."""

import time
from dataclasses import replace
from pathlib import Path

from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, build
from nanovllm import LLM
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.stats import StepStats


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


# The counter itself


def batch(is_prefill: bool, *lengths: int) -> Batch:
    return Batch(is_prefill, lengths=list(lengths))


def test_steps_are_counted_by_their_kind():
    stats = StepStats()
    assert (stats.prefill_rate, stats.decode_rate) == (0, 0), "nothing has taken no time"
    stats.add(batch(True, 5, 7), 2.0)
    stats.add(batch(False, 1, 1, 1), 0.5)
    stats.add(batch(True, 4), 2.0)
    assert stats == StepStats(16, 4.0, 3, 0.5)
    assert (stats.prefill_rate, stats.decode_rate) == (4, 6)


def test_what_came_after_a_copy():
    stats = StepStats(10, 1.0, 20, 2.0)
    before = replace(stats)
    stats.add(batch(False, 1, 1), 0.25)
    stats.add(batch(True, 3), 0.5)
    assert stats.since(before) == StepStats(3, 0.5, 2, 0.25)
    assert before == StepStats(10, 1.0, 20, 2.0)
