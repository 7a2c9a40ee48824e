"""The engine from the first request to the last: the step loop, aborting, closing."""

import warnings
import weakref
from pathlib import Path
from threading import Thread

import pytest

from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build, greedy
from nanovllm import LLM, SamplingParams

TWENTY = SamplingParams(temperature=0, max_tokens=20)


# The step loop


@BOTH_ORDERS
def test_add_request_and_step_give_the_same_as_generate(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        assert llm.is_finished()
        assert llm.step() == []
        prompts = dict((llm.add_request(prompt, GREEDY), prompt) for prompt in PROMPTS)
        assert len(prompts) == 4 and not llm.is_finished()
        outputs = []
        for _ in range(100):
            if llm.is_finished():
                break
            outputs += llm.step()
        assert sorted(output["request_id"] for output in outputs) == sorted(prompts)
        for output in outputs:
            prompt = prompts[output["request_id"]]
            assert output["token_ids"] == tiny_reference.tokens(prompt, 12)
        assert_empty(llm)


@BOTH_ORDERS
def test_a_request_is_given_back_as_soon_as_it_ends(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        short = llm.add_request("t1", SamplingParams(temperature=0, max_tokens=1))
        llm.add_request("t2", GREEDY)
        steps = 1
        while not (outputs := llm.step()):
            steps += 1
        assert [output["request_id"] for output in outputs] == [short]
        assert steps == 1 + async_scheduling
        assert not llm.is_finished()
        llm.abort_all()


def test_scheduler_is_the_only_owner_of_the_requests(llm: LLM):
    """Nobody holds a request that has ended."""
    llm.add_request(random_tokens(5), GREEDY)
    ended = weakref.ref(llm.scheduler.waiting[0])
    while not llm.is_finished():
        llm.step()
    assert ended() is None
    assert len(llm.model_runner.inputs._launched) <= 1


# Aborting


def test_abort_all_drops_every_request(llm: LLM, tiny_reference: Reference):
    for prompt in PROMPTS:
        llm.add_request(prompt, GREEDY)
    llm.step()
    llm.abort_all()
    assert_empty(llm)
    assert llm.step() == []
    (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert output["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)
    assert output["num_cached_tokens"] == 0, "after an abort nobody knows what the blocks hold"


@BOTH_ORDERS
def test_abort_drops_one_request_wherever_it_is(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, max_num_seqs=2, async_scheduling=async_scheduling) as llm:
        for steps in range(6):  # waiting, in a prefill under way, in a decode under way
            ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
            outputs = [output for _ in range(steps) for output in llm.step()]
            llm.abort(ids[0])
            llm.abort(ids[3])
            llm.abort(ids[3])
            llm.abort(-1)
            while not llm.is_finished():
                outputs += llm.step()
            tokens = {output["request_id"]: output["token_ids"] for output in outputs}
            assert tokens == {i: tiny_reference.tokens(PROMPTS[ids.index(i)], 12) for i in ids[1:3]}
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
        assert not llm._request_of_seq


def test_aborting_a_request_that_has_ended_does_nothing(llm: LLM):
    request_id = llm.add_request([1, 2], GREEDY)
    while not llm.is_finished():
        llm.step()
    llm.abort(request_id)
    assert llm.metrics()["requests_aborted"] == 0
    assert llm.metrics()["requests_finished"] == 1


# A cache that holds less than the model could


@pytest.mark.parametrize(
    ("asked", "num_blocks", "found", "reason"),
    [
        (640, 3, 48, "the KV cache has 3 blocks of 16 tokens"),
        (100_000, 3, 48, "the KV cache has 3 blocks of 16 tokens"),
        (641, 40, 640, "the model has 640 positions"),
        (641, 50, 640, "the model has 640 positions"),
    ],
)
def test_max_model_len_is_lowered_with_a_warning_that_points_here(
    tiny: Path, asked: int, num_blocks: int, found: int, reason: str
):
    options = {"kvcache_block_size": 16, "num_kvcache_blocks": num_blocks, "device": "cpu"}
    message = f"max_model_len lowered from {asked} to {found}: .*{reason}"
    with pytest.warns(UserWarning, match=message) as caught:
        llm = LLM(tiny, max_model_len=asked, **options)
    assert [warning.filename for warning in caught] == [__file__]
    with llm:
        assert llm.config.max_model_len == found
        (output,) = llm.generate(random_tokens(40), GREEDY, use_tqdm=False)
        assert len(output["token_ids"]) == min(12, found - 40)


def test_max_model_len_that_was_not_given_is_lowered_in_silence(tiny: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = build(tiny, num_kvcache_blocks=3)
    with llm:
        assert llm.config.max_model_len == 48
        assert len(llm.model_runner.cos_sin) == 48, "no more positions than can be"


@BOTH_ORDERS
def test_request_that_outgrows_the_whole_cache_ends_by_length(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, num_kvcache_blocks=2, async_scheduling=async_scheduling) as llm:
        prompts = [random_tokens(length, seed=length) for length in (20, 31, 3)]
        outputs = llm.generate(prompts, TWENTY, use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [12, 1, 20]
        for prompt, output in zip(prompts, outputs):
            expected = tiny_reference.tokens(prompt, len(output["token_ids"]))
            assert output["token_ids"] == expected
            assert output["finish_reason"] == "length"


def test_prompt_larger_than_the_whole_cache_is_refused(tiny: Path):
    with build(tiny, num_kvcache_blocks=2) as llm:
        with pytest.raises(ValueError, match=r"has 32 tokens.*num_kvcache_blocks"):
            llm.generate(random_tokens(32), GREEDY, use_tqdm=False)
        assert len(greedy(llm, [random_tokens(31)])[0]) == 1


# Closing, and living side by side


def test_closing_twice_does_nothing(tiny: Path):
    llm = build(tiny)
    llm.close()
    llm.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.generate([1, 2], GREEDY),
        lambda llm: llm.add_request([1, 2], GREEDY),
        lambda llm: llm.step(),
        lambda llm: llm.is_finished(),
        lambda llm: llm.abort_all(),
    ],
    ids=["generate", "add_request", "step", "is_finished", "abort_all"],
)
def test_use_after_close_is_refused(tiny: Path, use):
    llm = build(tiny)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        use(llm)


def test_context_manager_closes_also_after_an_error(tiny: Path):
    with pytest.raises(KeyError), build(tiny) as llm:
        llm.add_request([1, 2], GREEDY)
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([1, 2], GREEDY)


def test_close_with_requests_under_way(tiny: Path):
    llm = build(tiny, async_scheduling=True)
    llm.add_request([1, 2], GREEDY)
    llm.step()
    llm.close()


def test_two_engines_in_one_process_do_not_disturb_each_other(
    tiny: Path, tiny_reference: Reference
):
    expected = [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]
    with build(tiny) as first, build(tiny, kvcache_block_size=32, dtype="bfloat16") as second:
        with build(tiny, async_scheduling=True) as third:
            for prompt in PROMPTS:
                for llm in (first, second, third):
                    llm.add_request(prompt, GREEDY)
            found: dict[int, dict] = {}
            while not (first.is_finished() and second.is_finished() and third.is_finished()):
                for llm in (first, second, third):
                    for output in llm.step():
                        found.setdefault(id(llm), {})[output["request_id"]] = output["token_ids"]
            assert list(dict(sorted(found[id(first)].items())).values()) == expected
            assert list(dict(sorted(found[id(third)].items())).values()) == expected
        outputs = first.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected


def test_without_a_gpu_no_thread_is_needed(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Which an interpreter that shuts down would not start, nor a system that has no more."""

    def refuse(self: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    with build(tiny) as llm:
        assert llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0]["token_ids"]
