"""Several completions of one prompt."""

import pytest

from helpers.engines import BOTH_ORDERS, assert_empty
from helpers.small_model import PROMPT, Model, build, sample, summary, tokens_of, words
from nanovllm import LLM, SamplingParams
from nanovllm.engine.input_processor import nth_seed


@pytest.fixture
def llm(small_engine: LLM):
    """An engine for all tests, which must leave it empty."""
    yield small_engine
    assert_empty(small_engine)


@BOTH_ORDERS
def test_completions_differ_and_repeat(model: Model, async_scheduling: bool):
    options = {"seed": 11, "ignore_eos": True}
    with build(model, max_num_seqs=64, async_scheduling=async_scheduling) as llm:
        five, again, three, one, other = sample(
            llm, *(options | {"n": n} for n in (5, 5, 3, 1)), options | {"n": 5, "seed": 50}
        )
        assert_empty(llm)
    for output, n in ((five, 5), (three, 3), (one, 1)):
        assert [completion["index"] for completion in output["outputs"]] == list(range(n))
        first = output["outputs"][0]
        assert {key: output[key] for key in first} == first
    tokens = tokens_of(five["outputs"])
    assert len({*map(tuple, tokens)}) == 5
    assert tokens_of(again["outputs"]) == tokens
    assert tokens_of(three["outputs"]) == tokens[:3] and one["token_ids"] == tokens[0]
    assert {*map(tuple, tokens_of(other["outputs"]))}.isdisjoint(map(tuple, tokens))


def test_completions_without_a_seed_differ_and_repeat_with_the_engines(model: Model):
    found = []
    for seed in (0, 0, 1):
        with build(model, seed=seed) as llm:
            outputs = sample(llm, *[{"n": 3, "ignore_eos": True}] * 3)
            found.append([tokens for output in outputs for tokens in tokens_of(output["outputs"])])
    assert found[0] == found[1] != found[2]
    assert all(len({*map(tuple, tokens)}) == 9 for tokens in found)


def test_greedy_completions_are_equal(llm: LLM):
    (greedy,) = tokens_of(sample(llm, {"temperature": 0}))
    (output,) = sample(llm, {"temperature": 0, "n": 4})
    assert tokens_of(output["outputs"]) == [greedy] * 4


@pytest.mark.parametrize("seed", [2**64 - 2, 2**63 - 2, -2, -(2**63)])
def test_seeds_of_completions_wrap_around(llm: LLM, seed: int):
    (output,) = sample(llm, {"n": 4, "seed": seed, "ignore_eos": True})
    assert len({*map(tuple, tokens_of(output["outputs"]))}) == 4


def test_seeds_of_completions_are_those_of_splitmix64():
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # as Java has them
    assert [nth_seed(0, index) % 2**64 for index in range(4)] == [0, *outputs]
    for index, seed in enumerate((-5, 2**64 - 5)):
        assert nth_seed(seed, 0) == -5 and nth_seed(seed, index) == nth_seed(-5, index)


def test_requests_of_neighbouring_seeds_share_no_completion(llm: LLM):
    outputs = sample(llm, *({"n": 4, "seed": seed, "ignore_eos": True} for seed in range(8)))
    found = [tuple(tokens) for output in outputs for tokens in tokens_of(output["outputs"])]
    assert len({*found}) == len(found) == 32


@BOTH_ORDERS
@pytest.mark.parametrize(("length", "full"), [(40, 2), (33, 2), (32, 2), (16, 1), (1, 0)])
def test_completions_share_the_full_blocks_of_the_prompt(
    model: Model, length: int, full: int, async_scheduling: bool
):
    with build(model, async_scheduling=async_scheduling) as llm:
        params = SamplingParams(n=4, max_tokens=3, seed=0, ignore_eos=True)
        llm.add_request(words(length, seed=8), params)
        llm.step()
        assert llm.metrics()["kv_blocks_in_use"] == full + 4 * (-(-length // 16) - full)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert outputs[0]["num_cached_tokens"] == 0
        cached = min(16 * full, length - 1)  # the last token is always run
        assert llm.metrics()["cached_prompt_tokens"] == 3 * cached
        assert llm.stats.prefill_tokens == length + 3 * (length - cached)
        assert_empty(llm)


@BOTH_ORDERS
@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"max_num_batched_tokens": 5}], ids=str)
def test_completions_are_the_same_when_few_run_at_once(
    model: Model, limits: dict, async_scheduling: bool
):
    options = {"n": 5, "seed": 3, "temperature": 1.5, "frequency_penalty": 0.5}
    found = []
    for settings in ({}, limits | {"async_scheduling": async_scheduling}):
        with build(model, **settings) as llm:
            found += map(summary, sample(llm, options, prompt=words(40, seed=1)))
            assert_empty(llm)
    assert found[0] == found[1]


def drain(llm: LLM) -> list[dict]:
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    return outputs


@BOTH_ORDERS
def test_a_request_is_given_back_when_its_last_completion_has_ended(
    model: Model, async_scheduling: bool
):
    """Here the completions end one by one, with the stop tokens."""
    options = {"n": 6, "seed": 8, "max_tokens": 40, "stop_token_ids": list(range(8))}
    with build(model, async_scheduling=async_scheduling) as llm:
        (expected,) = map(summary, sample(llm, options))
        lengths = [len(tokens) for tokens, *_ in expected]
        assert len({*lengths}) == 6, "choose another seed"
        request_id = llm.add_request(PROMPT, SamplingParams(**options))
        steps = 1
        while not (outputs := llm.step()):
            steps += 1
        assert steps == max(lengths) + async_scheduling
        (output,) = outputs + drain(llm)
        assert output["request_id"] == request_id and summary(output) == expected
        metrics = output["metrics"]
        assert metrics["arrival_time"] <= metrics["first_token_time"] <= metrics["finished_time"]
        assert llm.metrics()["requests_finished"] == 2
        assert llm.metrics()["generated_tokens"] == 2 * sum(lengths)
        assert_empty(llm)


@BOTH_ORDERS
def test_a_request_whose_completions_end_together_is_given_back_once(
    model: Model, async_scheduling: bool
):
    with build(model, async_scheduling=async_scheduling) as llm:
        params = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
        ids = [llm.add_request(PROMPT, params) for _ in range(2)]
        assert [output["request_id"] for output in drain(llm)] == ids
        assert llm.metrics()["requests_finished"] == 2


@BOTH_ORDERS
def test_abort_drops_all_completions_wherever_they_are(model: Model, async_scheduling: bool):
    params = SamplingParams(
        n=6, seed=21, max_tokens=40, stop_token_ids=[0, 1, 2], ignore_eos=True, presence_penalty=0.1
    )
    other = SamplingParams(n=2, seed=1, max_tokens=12, ignore_eos=True)
    with build(model, max_num_seqs=5, async_scheduling=async_scheduling) as llm:
        (expected,) = map(summary, llm.generate([words(40, seed=2)], other, use_tqdm=False))
        for round_, steps in enumerate((0, 1, 2, 3, 6, 9, 14, 20), 1):
            dropped = llm.add_request(words(40, seed=3), params)
            kept = llm.add_request(words(40, seed=2), other)
            outputs = [output for _ in range(steps) for output in llm.step()]
            assert dropped not in [output["request_id"] for output in outputs]
            llm.abort(dropped)
            llm.abort(dropped)
            left = [*llm.scheduler.running, *llm.scheduler.waiting]
            assert {seq.seq_id for seq in left} <= {kept, kept + 1}
            outputs += drain(llm)
            assert {o["request_id"]: summary(o) for o in outputs} == {kept: expected}
            assert llm.metrics()["requests_aborted"] == round_
            assert_empty(llm)


def test_only_the_id_of_the_request_aborts_it(llm: LLM):
    aborted_before = llm.metrics()["requests_aborted"]
    request_id = llm.add_request(PROMPT, SamplingParams(n=3, max_tokens=3))
    for unknown in (request_id + 1, request_id + 2, request_id + 3):
        llm.abort(unknown)
    assert len(llm.scheduler.waiting) == 3
    assert llm.metrics()["requests_aborted"] == aborted_before
    llm.abort(request_id)
    assert llm.metrics()["requests_aborted"] == aborted_before + 1
    assert_empty(llm)
