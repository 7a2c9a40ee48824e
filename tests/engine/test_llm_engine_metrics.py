"""What the engine counts of its own work."""

from pathlib import Path

import pytest

from helpers.checkpoints import random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, build
from helpers.streams import gather
from nanovllm import LLM, SamplingParams


def counts(llm: LLM) -> dict[str, int | float]:
    """The engine's metrics without the rates."""
    found = llm.metrics()
    rates = {name: found.pop(name) for name in list(found) if name.endswith("_per_second")}
    assert set(rates) == {"prefill_tokens_per_second", "decode_tokens_per_second"}
    assert all(rate >= 0 for rate in rates.values())
    return found


@BOTH_ORDERS
def test_counts_after_known_work(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        expected = {
            "requests_running": 0, "requests_waiting": 0, "requests_finished": 0,
            "requests_aborted": 0, "prompt_tokens": 0, "cached_prompt_tokens": 0,
            "prefix_cache_hit_rate": 0, "generated_tokens": 0, "kv_blocks": 40,
            "kv_blocks_in_use": 0, "kv_blocks_peak": 0, "preemptions": 0,
        }  # fmt: skip
        assert counts(llm) == expected
        params = [SamplingParams(temperature=0, max_tokens=n) for n in (12, 3, 1, 7)]
        llm.generate(PROMPTS, params, use_tqdm=False)  # of 5, 40, 16, 33 tokens
        expected |= {"requests_finished": 4, "prompt_tokens": 94, "generated_tokens": 23}
        found = counts(llm)
        peak = found.pop("kv_blocks_peak")
        assert found == {key: expected[key] for key in found}
        # The prompts take 1 + 3 + 1 + 3 blocks. The first grows to 16 computed tokens: none more.
        assert peak == 8
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)  # 32 of 40 tokens are in the cache
        expected |= {
            "requests_finished": 5, "prompt_tokens": 134, "cached_prompt_tokens": 32,
            "prefix_cache_hit_rate": 32 / 134, "generated_tokens": 35, "kv_blocks_peak": 8,
        }  # fmt: skip
        assert counts(llm) == expected
        assert llm.metrics()["prefill_tokens_per_second"] == llm.stats.prefill_rate > 0
        assert llm.metrics()["decode_tokens_per_second"] == llm.stats.decode_rate > 0


def test_counts_while_requests_run_and_wait(tiny: Path):
    with build(tiny, max_num_seqs=2) as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]  # 5, 40, 16, 33 tokens
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (0, 4)
        assert (found["prompt_tokens"], found["kv_blocks_in_use"]) == (0, 0)
        llm.step()
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (2, 2)
        assert (found["prompt_tokens"], found["kv_blocks_in_use"]) == (45, 4)
        assert (found["generated_tokens"], found["requests_finished"]) == (0, 0)
        llm.abort(ids[0])
        llm.abort(ids[2])
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (1, 1)
        assert (found["requests_aborted"], found["kv_blocks_in_use"]) == (2, 3)
        assert found["kv_blocks_peak"] == 4
        while not llm.is_finished():
            llm.step()
        found = counts(llm)
        assert (found["requests_aborted"], found["requests_finished"]) == (2, 2)
        assert found["generated_tokens"] == 24, "those of finished requests"
        assert found["prompt_tokens"] == 5 + 40 + 33, "those of admitted requests"
        llm.add_request([1, 2], GREEDY)
        llm.add_request([1, 2], SamplingParams(n=3, seed=1))
        assert counts(llm)["requests_waiting"] == 4, "counted by completion"
        llm.abort_all()
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (0, 0)
        assert (found["requests_aborted"], found["requests_finished"]) == (4, 2)
        assert found["kv_blocks_peak"] > 0


def test_completions_of_one_prompt_share_its_blocks(tiny: Path):
    with build(tiny) as llm:
        params = SamplingParams(n=4, seed=1, max_tokens=5)
        llm.generate(random_tokens(40), params, use_tqdm=False)
        found = counts(llm)
    assert found["generated_tokens"] == 20
    assert (found["prompt_tokens"], found["cached_prompt_tokens"]) == (160, 3 * 32)
    assert found["prefix_cache_hit_rate"] == 0.6
    assert found["kv_blocks_peak"] == 2 + 4


def test_a_request_of_several_completions_counts_once(tiny: Path):
    with build(tiny) as llm:
        params = [SamplingParams(n=4, seed=1, max_tokens=5), GREEDY]
        llm.generate([[1, 2], [3]], params, use_tqdm=False)
        assert counts(llm)["requests_finished"] == 2


def test_tokens_of_an_aborted_request_are_not_counted(tiny: Path):
    with build(tiny, max_num_seqs=1) as llm:  # one completion after another
        request_id = llm.add_request([1, 2], SamplingParams(n=2, seed=1, max_tokens=3))
        for _ in range(3):
            assert llm.step() == []
        assert counts(llm)["requests_waiting"] == 1
        llm.abort(request_id)
        found = counts(llm)
        assert (found["requests_finished"], found["requests_aborted"]) == (0, 1)
        assert found["generated_tokens"] == 0


@BOTH_ORDERS
def test_preemptions_are_counted_and_prompts_only_once(tiny: Path, async_scheduling: bool):
    with build(
        tiny, num_kvcache_blocks=8, max_model_len=128, async_scheduling=async_scheduling
    ) as llm:
        prompts = [random_tokens(30, seed=seed) for seed in range(3)]
        params = SamplingParams(temperature=0, max_tokens=40)
        scheduler, preempted = llm.scheduler, []
        preempt = scheduler._preempt
        scheduler._preempt = lambda seq: (preempted.append(seq.seq_id), preempt(seq))
        llm.generate(prompts, params, use_tqdm=False)
        found = counts(llm)
    assert found["preemptions"] == len(preempted) > 0
    assert found["kv_blocks_peak"] == found["kv_blocks"] == 8
    assert (found["prompt_tokens"], found["cached_prompt_tokens"]) == (90, 0)
    assert found["generated_tokens"] == 120


def test_metrics_of_streams_are_those_of_generate(tiny: Path):
    with build(tiny) as first, build(tiny) as second:
        for _ in range(2):
            gather(first.stream(PROMPTS, GREEDY), 4)
            second.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert counts(first) == counts(second)
        assert counts(first)["prefix_cache_hit_rate"] == 2 * (32 + 32) / (4 * 94)


def test_metrics_of_a_closed_engine_are_refused(tiny: Path):
    llm = build(tiny)
    llm.close()
    for use in (llm.metrics, lambda: llm.abort(0)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
