"""Blocks that rows of a decode step share are read once, and nobody's tokens change by that."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import random_tokens
from helpers.engines import assert_empty, build
from helpers.kernel_inputs import interpreted
from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner, step_inputs
from nanovllm.engine.step_inputs import StepShape
from nanovllm.kernels import decode_plan, shared_plan
from nanovllm.layers.attention_backends import TorchBackend, TritonBackend

PREFIX = random_tokens(130, seed=1)


class DecodeInInterpreter(TritonBackend):
    """With prefill in torch, which is faster there."""

    def attend(self, *args) -> torch.Tensor:
        *_, context = args
        return (TorchBackend if context.is_prefill else TritonBackend).attend(self, *args)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """Of all steps. Sharing spares enough, however little it is."""
    monkeypatch.setattr(shared_plan, "FEWEST_SPARED_TOKENS", 1)
    fill, seen = step_inputs.InputBuffers.fill, []

    def recorded(*args, **options):
        shape, num_words = fill(*args, **options)
        seen.append(shape)
        return shape, num_words

    monkeypatch.setattr(step_inputs.InputBuffers, "fill", recorded)
    return seen


def generate(llm: LLM, n: int, num_prompts: int, max_tokens: int) -> list[list[list[int]]]:
    """Completions of one prompt, and requests with a common prefix, which end one by one."""
    prompts = [random_tokens(77, seed=2)]
    params = [SamplingParams(n=n, seed=3, max_tokens=max_tokens, ignore_eos=True)]
    for i in range(num_prompts):
        prompts.append(PREFIX + random_tokens(1 + 5 * i, seed=10 + i))
        params.append(SamplingParams(temperature=0, max_tokens=max_tokens - i, ignore_eos=True))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_empty(llm)
    return [[one["token_ids"] for one in output["outputs"]] for output in outputs]


@interpreted
def test_tokens_are_those_of_the_torch_backend(
    tiny: Path, shapes: list[StepShape], monkeypatch: pytest.MonkeyPatch
):
    """The whole engine, with the kernels of decode attention in the interpreter."""
    few: dict = {"n": 3, "num_prompts": 2, "max_tokens": 3}
    with build(tiny, kvcache_block_size=64) as llm:
        expected = generate(llm, **few)
    assert not any(shape.shares for shape in shapes)
    backend = DecodeInInterpreter.__new__(DecodeInInterpreter)
    backend.block_size, backend.num_ranges = 64, 3
    backend.head_dim, backend.fp8_cache = 16, False
    allocate = model_runner.allocate_kv_cache

    def as_on_a_gpu(*args, **options):
        return [tuple(one.contiguous() for one in pair) for pair in allocate(*args, **options)]

    monkeypatch.setattr(model_runner, "make_backend", lambda *_, **__: backend)
    monkeypatch.setattr(model_runner, "allocate_kv_cache", as_on_a_gpu)
    shapes.clear()
    with build(tiny) as llm:
        assert generate(llm, **few) == expected
    assert [shape.shares for shape in shapes if not shape.is_prefill] == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_do_not_depend_on_whether_blocks_are_read_together_gpu(
    tiny: Path, shapes: list[StepShape], monkeypatch: pytest.MonkeyPatch, dtype: str
):
    options: dict = {"device": "cuda", "num_kvcache_blocks": 600, "max_num_seqs": 64}
    options |= {"dtype": dtype, "attention_backend": "triton"}
    begin_alike = decode_plan.begin_alike
    found = []
    for eager in (False, True):
        for shares in (True, False):
            look = begin_alike if shares else lambda tables: False
            monkeypatch.setattr(decode_plan, "begin_alike", look)
            shapes.clear()
            with build(tiny, enforce_eager=eager, **options) as llm:
                # Graphs are captured, then replayed.
                found.append([generate(llm, n=8, num_prompts=20, max_tokens=60) for _ in "12"])
            assert any(shape.shares for shape in shapes) == shares
    assert found[0] == found[1] and found[2] == found[3]
    if dtype == "float32":
        with build(tiny, **options | {"attention_backend": "torch"}) as llm:
            expected = generate(llm, n=8, num_prompts=20, max_tokens=60)
        assert all(tokens == expected for runs in found for tokens in runs)
