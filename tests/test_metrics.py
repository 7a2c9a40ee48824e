"""Times of requests, counts of the engine, and what aborting does to them."""

import time
from pathlib import Path

import pytest

from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build
from helpers.streams import gather
from nanovllm import LLM, SamplingParams


@pytest.fixture
def llm(tiny: Path):
    with build(tiny) as engine:
        yield engine


# Aborting one request


@BOTH_ORDERS
def test_an_aborted_request_of_several_completions_is_gone_whole(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    several = SamplingParams(n=3, seed=5, max_tokens=9)
    with build(tiny, max_num_seqs=3, async_scheduling=async_scheduling) as llm:
        for steps in range(5):
            aborted = llm.add_request(PROMPTS[0], several)
            kept = llm.add_request(PROMPTS[1], GREEDY)
            outputs = [output for _ in range(steps) for output in llm.step()]
            llm.abort(aborted + 1)  # no request's id
            assert llm.metrics()["requests_aborted"] == steps
            assert llm.scheduler.num_unfinished == 4
            llm.abort(aborted)
            llm.abort(aborted)
            assert llm.metrics()["requests_aborted"] == steps + 1
            assert llm.scheduler.num_unfinished == 1
            while not llm.is_finished():
                outputs += llm.step()
            assert [output["request_id"] for output in outputs] == [kept]
            assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[1], 12)
            assert_empty(llm)


@BOTH_ORDERS
def test_a_request_whose_first_completion_has_ended_can_be_aborted(
    tiny: Path, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        # Seeds whose completions end after different numbers of tokens, the first one first.
        for seed in range(100):
            params = SamplingParams(
                n=3, seed=seed, max_tokens=20, stop_token_ids=[*range(10)], temperature=2
            )
            (output,) = llm.generate([1, 2], params, use_tqdm=False)
            lengths = [len(one["token_ids"]) for one in output["outputs"]]
            if lengths[0] + 3 < min(lengths[1:]):
                break
        aborted_before = llm.metrics()["requests_aborted"]
        request_id = llm.add_request([1, 2], params)
        for _ in range(lengths[0] + 2):
            assert llm.step() == []
        assert llm.scheduler.num_unfinished == 2
        llm.abort(request_id)
        assert llm.metrics()["requests_aborted"] == aborted_before + 1
        while not llm.is_finished():
            assert llm.step() == []
        assert_empty(llm)
        assert not llm._requests


def test_aborting_a_request_that_has_ended_does_nothing(llm: LLM):
    request_id = llm.add_request([1, 2], GREEDY)
    while not llm.is_finished():
        llm.step()
    llm.abort(request_id)
    assert llm.metrics()["requests_aborted"] == 0
    assert llm.metrics()["requests_finished"] == 1


@BOTH_ORDERS
def test_a_request_of_several_completions_is_given_back_once(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        request_id = llm.add_request([1, 2], SamplingParams(n=3, seed=1, max_tokens=4))
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["request_id"] for output in outputs] == [request_id]
        assert [one["index"] for one in outputs[0]["outputs"]] == [0, 1, 2]


# Metrics of a request


@BOTH_ORDERS
def test_times_of_a_request_are_in_order(tiny: Path, async_scheduling: bool):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 12, 5)]
    with build(tiny, max_num_seqs=2, async_scheduling=async_scheduling) as llm:
        before = time.time()
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        after = time.time()
    for param, output in zip(params, outputs, strict=True):
        times = output["metrics"]
        assert set(times) == {
            "arrival_time", "first_token_time", "finished_time", "time_to_first_token",
            "time_per_output_token",
        }  # fmt: skip
        arrival, first, last = (
            times[name] for name in ("arrival_time", "first_token_time", "finished_time")
        )
        assert before <= arrival < first <= last <= after
        assert times["time_to_first_token"] == first - arrival > 0
        if param.max_tokens == 1:
            assert times["time_per_output_token"] is None
        else:
            mean = (last - first) / (param.max_tokens - 1)
            assert times["time_per_output_token"] == pytest.approx(mean)
            assert mean > 0
    assert len({output["metrics"]["arrival_time"] for output in outputs}) == 1
    waited = outputs[3]["metrics"]["first_token_time"]
    assert waited > outputs[0]["metrics"]["finished_time"], "only two run at once"


def test_times_of_a_request_include_its_time_in_the_queue(llm: LLM):
    llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
    time.sleep(0.2)
    outputs = llm.step()
    time.sleep(0.2)
    while not llm.is_finished():
        outputs += llm.step()
    (output,) = outputs
    assert output["metrics"]["time_to_first_token"] >= 0.19
    assert output["metrics"]["time_per_output_token"] >= 0.09


def test_times_of_several_completions_are_of_the_first_and_the_last(tiny: Path):
    with build(tiny, max_num_seqs=1) as llm:  # one after another
        params = SamplingParams(n=3, seed=1, max_tokens=4)
        (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)
        times = output["metrics"]
        assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]
        assert times["time_per_output_token"] > 0


@BOTH_ORDERS
def test_a_preempted_request_keeps_the_time_of_its_first_token(tiny: Path, async_scheduling: bool):
    with build(
        tiny, num_kvcache_blocks=8, max_model_len=128, async_scheduling=async_scheduling
    ) as llm:
        prompts = [random_tokens(30, seed=seed) for seed in range(3)]
        params = SamplingParams(temperature=0, max_tokens=40)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.metrics()["preemptions"] > 0
    first = [output["metrics"]["first_token_time"] for output in outputs]
    assert max(first[:2]) < min(output["metrics"]["finished_time"] for output in outputs)
    for output in outputs:
        times = output["metrics"]
        assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]


@BOTH_ORDERS
def test_a_chunk_that_leaves_one_token_of_the_prompt(tiny: Path, async_scheduling: bool):
    """It runs in a decode step."""
    with build(tiny, max_num_batched_tokens=16, async_scheduling=async_scheduling) as llm:
        (output,) = llm.generate([random_tokens(33)], GREEDY, use_tqdm=False)
    times = output["metrics"]
    assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]


# Metrics of the engine


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
