"""Ctrl-C, or an exception, in the middle of a run: the engine is empty after, and works."""

from pathlib import Path

import pytest
import torch

from helpers.allowed import Allowed
from helpers.checkpoints import Reference
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, Fault, assert_empty, build
from nanovllm import LLM, SamplingParams
from nanovllm.engine import input_processor
from nanovllm.engine.sequence import Sequence


@BOTH_ORDERS
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device on fire")], ids=repr)
@pytest.mark.parametrize(
    ("place", "after"),
    [
        ("model_runner.launch", False), ("model_runner.launch", True),
        ("model_runner.collect", False), ("model_runner.collect", True),
        ("model_runner.model.compute_logits", False), ("model_runner.sampler.sample", False),
        ("scheduler.schedule", False), ("scheduler.schedule", True),
        ("scheduler.postprocess", False), ("scheduler.postprocess", True),
        ("scheduler.add", True), ("output_processor.output", False), ("step", True),
        ("scheduler.block_manager.allocate", True), ("scheduler.block_manager.append", True),
        ("scheduler.block_manager.free", False), ("scheduler.block_manager.register", True),
    ],
)  # fmt: skip
def test_failure_in_the_middle_leaves_an_empty_engine(
    tiny: Path,
    tiny_reference: Reference,
    place: str,
    after: bool,
    error: BaseException,
    async_scheduling: bool,
):
    """Ctrl-C, or an exception, anywhere in `generate`: at its first call, and deep in the run."""
    with build(
        tiny, num_kvcache_blocks=8, max_model_len=128, async_scheduling=async_scheduling
    ) as llm:
        *owners, name = place.split(".")
        for at_call in (1, 2 if name == "append" else 3):  # few blocks are appended
            owner = llm
            for part in owners:
                owner = getattr(owner, part)
            fault = Fault(owner, name, at_call, error, after)
            with pytest.raises(type(error)):
                llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            fault.remove()
            assert_empty(llm)
            outputs = llm.generate(PROMPTS[::-1], GREEDY, use_tqdm=False)
            for prompt, output in zip(PROMPTS[::-1], outputs, strict=True):
                assert output["token_ids"] == tiny_reference.tokens(prompt, 12)
            assert_empty(llm)


@BOTH_ORDERS
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device on fire")], ids=repr)
def test_an_error_comes_with_the_outputs_that_are_there(
    tiny: Path, tiny_reference: Reference, error: BaseException, async_scheduling: bool
):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5, 1)]
    with build(tiny, async_scheduling=async_scheduling) as llm:
        Fault(llm.model_runner, "launch", 7, error, False)
        with pytest.raises(type(error)) as caught:
            llm.generate(PROMPTS, params, use_tqdm=False)
    long, *others = caught.value.finished_outputs
    assert long is None
    for prompt, param, output in zip(PROMPTS[1:], params[1:], others, strict=True):
        assert output["token_ids"] == tiny_reference.tokens(prompt, param.max_tokens)


def test_outputs_of_the_step_that_fails_come_with_the_error(
    llm: LLM, tiny_reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    """With a constraint, the tokens before are read while the step is under way."""
    monkeypatch.setattr(
        input_processor,
        "Sequence",
        lambda *args: Sequence(*args[:6], constraint=Allowed()),
    )
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (2, 9)]
    llm.config.async_scheduling = True
    Fault(llm.model_runner, "sample_late", 3, RuntimeError("device on fire"), False)
    with pytest.raises(RuntimeError) as caught:
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    short, long = caught.value.finished_outputs
    assert short["token_ids"] == tiny_reference.tokens(PROMPTS[0], 2)
    assert long is None


@BOTH_ORDERS
def test_failed_step_of_the_loop_aborts_and_the_engine_goes_on(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for prompt in PROMPTS:
            llm.add_request(prompt, GREEDY)
        llm.step()
        fault = Fault(llm.model_runner, "launch", 1, RuntimeError("device on fire"), False)
        with pytest.raises(RuntimeError, match="device on fire"):
            llm.step()
        fault.remove()
        assert_empty(llm)
        (output,) = llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(PROMPTS[1], 12)


@pytest.mark.gpu
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device on fire")], ids=repr)
def test_failure_while_a_graph_is_captured(
    tiny: Path, tiny_reference: Reference, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    with build(tiny, device="cuda", attention_backend="triton", dtype="float32") as llm:
        compute_logits = llm.model_runner.model.compute_logits

        def fail(stream, out=None):
            if torch.cuda.is_current_stream_capturing():
                raise error
            return compute_logits(stream, out)

        monkeypatch.setattr(llm.model_runner.model, "compute_logits", fail)
        with pytest.raises(type(error)):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        monkeypatch.undo()
        assert_empty(llm)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert output["token_ids"] == tiny_reference.tokens(prompt, 12)
