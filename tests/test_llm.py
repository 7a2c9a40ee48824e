"""LLM.generate: lists of prompts in, results in their order out."""

from pathlib import Path

import pytest

from helpers.checkpoints import Reference, edit_json, random_tokens
from helpers.engines import GREEDY, PROMPTS, assert_empty, build, greedy
from nanovllm import LLM, SamplingParams

# Prompts and results


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM, tiny_reference: Reference):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5, 1)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, param, output in zip(PROMPTS, params, outputs, strict=True):
        assert output["token_ids"] == tiny_reference.tokens(prompt, param.max_tokens)


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


def test_dicts_stand_for_prompts(llm: LLM):
    expected = llm.generate(["t1 t2", [3, 4]], GREEDY, use_tqdm=False)
    found = llm.generate(
        [{"prompt": "t1 t2"}, {"prompt_token_ids": [3, 4]}], GREEDY, use_tqdm=False
    )
    (alone,) = llm.generate({"prompt": "t1 t2"}, GREEDY, use_tqdm=False)
    for output, one in zip((*found, alone), (*expected, expected[0]), strict=True):
        for key in ("prompt", "prompt_token_ids", "token_ids", "text"):
            assert output[key] == one[key]


def test_the_callers_prompt_is_not_changed(llm: LLM):
    prompt = [1, 2, 3]
    llm.generate([prompt, prompt], GREEDY, use_tqdm=False)
    assert prompt == [1, 2, 3]


def test_without_params_the_defaults_hold(llm: LLM):
    (output,) = llm.generate([1, 2, 3], use_tqdm=False)
    assert len(output["token_ids"]) == SamplingParams().max_tokens


def test_list_of_sampling_params_goes_one_to_a_prompt(tiny: Path, tiny_reference: Reference):
    prompts = [random_tokens(10, seed=seed) for seed in range(4)]
    params = [
        SamplingParams(temperature=0, max_tokens=3),
        SamplingParams(temperature=1.0, max_tokens=9, seed=1),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=1e-7, max_tokens=6),  # as good as greedy
    ]
    with build(tiny) as llm:
        found = greedy(llm, prompts, params)
        assert [len(tokens) for tokens in found] == [3, 9, 1, 6]
        for i in (0, 2, 3):
            expected = tiny_reference.tokens(prompts[i], params[i].max_tokens)
            assert found[i] == expected
        assert greedy(llm, prompts[1:2], params[1]) == found[1:2]


def test_progress_shows_prefill_and_decode_rates(llm: LLM, capsys: pytest.CaptureFixture):
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "prefill" in shown and "decode" in shown
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


# Beside the step loop


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


def test_generate_after_a_loop_that_left_a_step_under_way(
    tiny_copy: Path, tiny_reference: Reference
):
    """A request that ended by EOS had its next step launched: nobody has to collect it."""
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
