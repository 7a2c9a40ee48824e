"""The engine as its users see it: results, the step loop, closing."""

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build
from nanovllm import LLM, SamplingParams


@pytest.fixture
def llm(tiny: Path):
    with build(tiny) as engine:
        yield engine


# Results


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM, tiny_reference: Reference):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5, 1)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, param, output in zip(PROMPTS, params, outputs, strict=True):
        assert output["token_ids"] == tiny_reference.tokens(prompt, param.max_tokens)


def test_output_has_these_keys_and_types(llm: LLM):
    (output,) = llm.generate("t1 t2 t3", GREEDY, use_tqdm=False)
    assert {key: type(value) for key, value in output.items()} == {
        "request_id": int, "prompt": str, "prompt_token_ids": list, "prompt_logprobs": type(None),
        "num_prompt_tokens": int, "num_cached_tokens": int, "outputs": list, "metrics": dict,
        "index": int, "text": str, "token_ids": list, "finish_reason": str,
        "stop_reason": type(None), "logprobs": type(None), "cumulative_logprob": type(None),
    }  # fmt: skip
    assert output["outputs"] == [{key: output[key] for key in output["outputs"][0]}]
    assert {type(token) for token in output["token_ids"]} == {int}
    assert output["num_prompt_tokens"] == 3
    assert output["finish_reason"] == "length"


def test_text_is_the_decoded_tokens(llm: LLM):
    (output,) = llm.generate("t1 t2 t3", GREEDY, use_tqdm=False)
    assert output["text"] == " ".join(f"t{token}" for token in output["token_ids"])


def test_text_leaves_out_the_end_of_sequence_token(tiny_copy: Path, tiny_reference: Reference):
    from helpers.checkpoints import add_tokenizer

    tokens = tiny_reference.tokens([1, 2, 3], 12)
    add_tokenizer(tiny_copy, eos_token=f"t{tokens[2]}")
    end = tokens.index(tokens[2]) + 1
    with build(tiny_copy) as llm:
        (output,) = llm.generate("t1 t2 t3", GREEDY, use_tqdm=False)
    assert (output["token_ids"], output["finish_reason"]) == (tokens[:end], "stop")
    assert output["text"] == " ".join(f"t{token}" for token in tokens[: end - 1])


@pytest.mark.parametrize(
    "prompts",
    ["t1 t2 t3", ["t1 t2 t3"], [1, 2, 3], [[1, 2, 3]], (1, 2, 3), ((1, 2, 3),)],
    ids=str,
)
def test_one_prompt_in_any_form_gives_a_list_of_one(
    llm: LLM, tiny_reference: Reference, prompts: object
):
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [tiny_reference.tokens([1, 2, 3], 12)]


def test_strings_and_token_ids_mix(llm: LLM, tiny_reference: Reference):
    outputs = llm.generate(["t1 t2 t3", [1, 2, 3], "t9"], GREEDY, use_tqdm=False)
    expected = [tiny_reference.tokens(prompt, 12) for prompt in ([1, 2, 3], [1, 2, 3], [9])]
    assert [output["token_ids"] for output in outputs] == expected


def test_the_callers_prompt_is_not_changed(llm: LLM):
    prompt = [1, 2, 3]
    llm.generate([prompt, prompt], GREEDY, use_tqdm=False)
    assert prompt == [1, 2, 3]


def test_without_params_the_defaults_hold(llm: LLM):
    (output,) = llm.generate([1, 2, 3], use_tqdm=False)
    assert len(output["token_ids"]) == SamplingParams().max_tokens


def test_progress_shows_prefill_and_decode_rates(llm: LLM, capsys: pytest.CaptureFixture):
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "prefill" in shown and "decode" in shown
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


@BOTH_ORDERS
def test_stats_count_every_token_run(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.stats.prefill_tokens == sum(map(len, PROMPTS))
        assert llm.stats.decode_tokens == 4 * (GREEDY.max_tokens - 1)
        assert llm.stats.prefill_seconds > 0 and llm.stats.decode_seconds > 0


def test_dicts_stand_for_prompts(llm: LLM):
    expected = llm.generate(["t1 t2", [3, 4]], GREEDY, use_tqdm=False)
    found = llm.generate(
        [{"prompt": "t1 t2"}, {"prompt_token_ids": [3, 4]}], GREEDY, use_tqdm=False
    )
    (alone,) = llm.generate({"prompt": "t1 t2"}, GREEDY, use_tqdm=False)
    for output, one in zip((*found, alone), (*expected, expected[0]), strict=True):
        for key in ("prompt", "prompt_token_ids", "token_ids", "text"):
            assert output[key] == one[key]


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


def test_generate_is_refused_while_requests_are_outstanding(llm: LLM, tiny_reference: Reference):
    request_id = llm.add_request(PROMPTS[0], GREEDY)
    llm.step()
    with pytest.raises(RuntimeError, match=r"1 requests .* are unfinished"):
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert [output["request_id"] for output in outputs] == [request_id]
    assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)
    assert len(llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)) == 1


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


def test_generate_after_a_loop_that_left_a_step_under_way(
    tiny_copy: Path, tiny_reference: Reference
):
    """A request that ended by EOS had its next step launched: nobody has to collect it."""
    from helpers.checkpoints import edit_json

    expected = tiny_reference.tokens(PROMPTS[0], 12)
    edit_json(tiny_copy / "generation_config.json", eos_token_id=expected[3])
    with build(tiny_copy, async_scheduling=True) as llm:
        llm.add_request(PROMPTS[0], GREEDY)
        outputs = []
        while not outputs:
            outputs = llm.step()
        (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        assert output["token_ids"] == expected[: expected.index(expected[3]) + 1]
        assert_empty(llm)


def test_steps_in_a_row_use_different_host_memory(llm: LLM):
    """The device may still be reading the inputs of the step before."""
    turns = []
    launch = llm.model_runner.launch

    def spy(batch):
        result = launch(batch)
        turns.append(llm.model_runner.inputs.turn)
        return result

    llm.model_runner.launch = spy
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert turns == [turns[0] ^ (i & 1) for i in range(len(turns))]


def test_time_between_calls_is_not_counted(llm: LLM):
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    before = llm.stats.prefill_seconds + llm.stats.decode_seconds
    time.sleep(0.5)
    start = time.perf_counter()
    llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    spent = time.perf_counter() - start
    assert llm.stats.prefill_seconds + llm.stats.decode_seconds - before <= spent


def test_another_default_device_does_no_harm(tiny: Path, tiny_reference: Reference):
    torch.set_default_device("meta")
    try:
        with build(tiny) as llm:
            (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    finally:
        torch.set_default_device(None)
    assert output["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)


def test_a_request_aborted_while_generate_runs_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a signal handler might."""
    with build(tiny) as llm:
        step = llm.step

        def abort_one() -> list:
            llm.abort(1)
            return step()

        monkeypatch.setattr(llm, "step", abort_one)
        with pytest.raises(RuntimeError, match=r"aborted while generate\(\) ran: prompts \[1\]"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert_empty(llm)


def test_scheduler_is_the_only_owner_of_the_requests(llm: LLM):
    """Nobody holds a request that has ended."""
    llm.add_request(random_tokens(5), GREEDY)
    ended = weakref.ref(llm.scheduler.waiting[0])
    while not llm.is_finished():
        llm.step()
    assert ended() is None
    assert len(llm.model_runner._launched_rows) <= 1


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


def test_close_gives_the_kv_cache_back(tiny: Path):
    llm = build(tiny)
    llm.generate([1, 2], GREEDY, use_tqdm=False)
    cache = weakref.ref(llm.model_runner.kv_cache)
    model = weakref.ref(llm.model_runner.model)
    llm.close()
    gc.collect()
    assert cache() is None and model() is None


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


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_torch_is_left_as_it_was(tiny: Path, dtype: str):
    def settings() -> tuple:
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_rng_state().tolist(),
        )  # fmt: skip

    before = settings()
    with build(tiny, dtype=dtype) as llm:
        assert settings() == before
        llm.generate([1, 2, 3], SamplingParams(max_tokens=4), use_tqdm=False)
        assert settings() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_repeats(tiny: Path, dtype: str):
    with build(tiny, dtype=dtype) as llm:
        first, second = (llm.generate(PROMPTS, GREEDY, use_tqdm=False) for _ in range(2))
        assert llm.model_runner.kv_cache.dtype == getattr(torch, dtype)
        assert [len(output["token_ids"]) for output in first] == [12] * 4
        assert [output["finish_reason"] for output in second] == ["length"] * 4
