"""Logits that are no numbers: the request ends in an error that says so, and the others go on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import Reference
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build
from nanovllm import LLM, SamplingParams

BROKEN_TOKEN = 28
BROKEN = [3, BROKEN_TOKEN, 9]
MESSAGE = "the model's logits have NaN or infinity: look for such weights"


def break_token(llm: LLM) -> None:
    weight = dict(llm.model_runner.model.named_parameters())["model.embed_tokens.weight"]
    with torch.inference_mode():
        weight[BROKEN_TOKEN] = float("nan")


@pytest.fixture
def llm(tiny: Path) -> Iterator[LLM]:
    with build(tiny) as llm:
        break_token(llm)
        yield llm


@BOTH_ORDERS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 3])
def test_a_broken_request_ends_in_an_error_and_the_others_go_on(
    tiny: Path,
    tiny_reference: Reference,
    async_scheduling: bool,
    temperature: float,
    n: int,
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        break_token(llm)
        assert not any(BROKEN_TOKEN in prompt for prompt in PROMPTS)
        prompts = [PROMPTS[0], BROKEN, *PROMPTS[1:]]
        broken = SamplingParams(temperature=temperature, n=n, max_tokens=12, top_k=5)
        params = [GREEDY, broken, *[GREEDY] * 3]
        with pytest.raises(RuntimeError, match=f"prompt 1: {MESSAGE}") as caught:
            llm.generate(prompts, params, use_tqdm=False)
        outputs = caught.value.finished_outputs
        bad = outputs.pop(1)
        assert bad["outputs"][0]["finish_reason"] == "error" and not bad["token_ids"]
        assert bad["metrics"]["time_to_first_token"] >= 0
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert output["token_ids"] == tiny_reference.tokens(prompt, 12)
        assert_empty(llm)


@BOTH_ORDERS
@pytest.mark.parametrize("logprobs", [0, 3])
def test_log_probabilities_with_a_broken_request(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool, logprobs: int
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        break_token(llm)
        params = SamplingParams(temperature=0, max_tokens=12, logprobs=logprobs)
        with pytest.raises(RuntimeError, match=f"prompt 0: {MESSAGE}") as caught:
            llm.generate([BROKEN, PROMPTS[1]], params, use_tqdm=False)
        bad, good = caught.value.finished_outputs
        assert good["token_ids"] == tiny_reference.tokens(PROMPTS[1], 12)
        assert len(good["logprobs"]) == 12 and bad["logprobs"] == []


def test_a_token_that_breaks_the_model_later_ends_the_request_there(llm: LLM):
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={BROKEN_TOKEN: 100})
    with pytest.raises(RuntimeError, match=MESSAGE) as caught:
        llm.generate(PROMPTS[0], params, use_tqdm=False)
    (output,) = caught.value.finished_outputs
    assert output["token_ids"] == [BROKEN_TOKEN] and output["finish_reason"] == "error"
    assert_empty(llm)


def test_a_stream_goes_on_with_the_others_and_fails_in_the_end(llm: LLM, tiny_reference: Reference):
    found: list[int] = []
    with pytest.raises(RuntimeError, match=f"prompt 0: {MESSAGE}"):
        for piece in llm.stream([BROKEN, PROMPTS[1]], GREEDY):
            found += piece["token_ids"] if piece["index"] == 1 else []
    assert found == tiny_reference.tokens(PROMPTS[1], 12)
    assert_empty(llm)


def test_steps_by_hand_give_the_error_as_an_output(llm: LLM):
    llm.add_request(BROKEN, GREEDY)
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    (output,) = outputs
    assert output["finish_reason"] == "error" and output.error.startswith(MESSAGE)
