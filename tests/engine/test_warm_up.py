"""What runs before the first request, on a CPU with what it asks of a GPU stood in for."""

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.checkpoints import edit_json
from helpers.engines import GREEDY, build, greedy
from nanovllm.engine import warm_up as warm_up_module
from nanovllm.engine.cuda_graphs import graph_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step_inputs import InputBuffers, StepShape
from nanovllm.engine.warm_up import compile_ahead, warm_up
from nanovllm.kernels.prefill_plan import SHORT_TILE, TILE, PrefillPlan
from nanovllm.layers.attention_backends import TorchBackend, TritonBackend

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """Those that run."""
    found = []
    run_shape = ModelRunner.run_shape

    def noted(self: ModelRunner, shape: StepShape) -> torch.Tensor:
        found.append(shape)
        return run_shape(self, shape)

    monkeypatch.setattr(ModelRunner, "run_shape", noted)
    return found


def test_the_largest_steps_run_and_change_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[StepShape]
):
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    peaks = iter([1000, 5000])
    monkeypatch.setattr(warm_up_module, "_activation_bytes", lambda device: next(peaks))
    with build(tiny, max_num_seqs=8, max_num_batched_tokens=64) as llm:
        runner = llm.model_runner
        expected = greedy(llm, PROMPTS, GREEDY)
        # As integers: what was never written may be NaN.
        caches = [cache.view(torch.int32) for layer in runner.kv_cache for cache in layer]
        before = [cache.clone() for cache in caches]
        shapes.clear()
        with torch.inference_mode():
            num_bytes = warm_up(runner, use_graphs=True)
        assert num_bytes == 5000 + 1000 + runner.sampler.edits.num_bytes
        assert [(one.is_prefill, one.rows, one.tokens) for one in shapes] == [
            (False, 8, 8), (True, 1, 64), (False, 8, 8), (True, 1, 63)
        ]  # fmt: skip
        assert not runner.inputs.device.any()
        assert all(torch.equal(*pair) for pair in zip(before, caches))
        llm.reset_prefix_cache()
        assert greedy(llm, PROMPTS, GREEDY) == expected


def test_all_decode_shapes_are_compiled_for_with_two_layers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[StepShape]
):
    with build(tiny, max_num_seqs=20, max_num_batched_tokens=64) as llm:
        runner = llm.model_runner
        decoder, layers = runner.model.model, runner.model.model.layers
        runner.compiler = SimpleNamespace(ahead=nullcontext)
        with torch.inference_mode():
            decode = compile_ahead(runner, use_graphs=True)
        runner.compiler = None
        assert decoder.layers is layers
        sizes = graph_sizes(20)
        assert {(one.rows, one.truncates) for one in decode} == {
            (rows, truncates) for rows in sizes for truncates in (False, True)
        }
        assert {one.rows for one in shapes if not one.is_prefill} == set(sizes)
        assert {one.rows for one in shapes if one.is_prefill} == {1, 3, 17}


class NotingBackend(TorchBackend):
    """Torch's, with the metadata of the kernels, which it notes."""

    max_prefill_words = TritonBackend.max_prefill_words
    prepare_prefill = TritonBackend.prepare_prefill
    prefill_metadata = TritonBackend.prefill_metadata

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.noted: list[PrefillPlan] = []

    def attend(self, *args: Any) -> torch.Tensor:
        if args[-1].is_prefill:
            plan = args[-1].metadata
            self.noted.append(plan._replace(tiles=plan.tiles.clone()))
        return super().attend(*args)


def test_attention_of_short_prompts_and_of_long_ones_is_compiled(tiny_copy: Path):
    """Which kernel it is, and its tiles, depend on the tokens, the longest row, and context."""
    edit_json(tiny_copy / "config.json", max_position_embeddings=2000)
    with build(
        tiny_copy, max_num_seqs=4, max_num_batched_tokens=3072, num_kvcache_blocks=130
    ) as llm:
        runner = llm.model_runner
        backend = runner.backend = NotingBackend(runner.config.kvcache_block_size)
        runner.inputs = InputBuffers(runner.config, backend)
        runner.compiler = SimpleNamespace(ahead=nullcontext)
        with torch.inference_mode():
            compile_ahead(runner, use_graphs=True)
        runner.compiler = None
        found = {
            (plan.tile, int(plan.tiles[:, 1].sum()), plan.max_seqlen_q, plan.max_context_len)
            for plan in backend.noted
        }
        assert found == {
            (TILE, 3072, 1999, 2000), (SHORT_TILE, 3, 1, 2000), (TILE, 189, 63, 63),
            (TILE, 963, 321, 321), (TILE, 3069, 1023, 1023),
        }  # fmt: skip


@pytest.mark.parametrize(("max_tokens", "expected"), [(40, []), (41, [40]), (119, [40]), (120, [])])
def test_a_step_just_too_short_for_the_gate_in_the_product_is_measured(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[StepShape],
    max_tokens: int, expected: list[int],
):  # fmt: skip
    """It holds gate and up in memory, and may need more than one of a few tokens more. What the
    cache's memory held before is of no matter."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(warm_up_module, "_activation_bytes", lambda device: 1)
    monkeypatch.setattr(warm_up_module, "kernels", SimpleNamespace(GATED_MIN_ROWS=41))
    monkeypatch.setattr(warm_up_module, "_smaller_prefill_shapes", lambda runner: [])
    with build(tiny, max_num_seqs=8, max_num_batched_tokens=max_tokens) as llm:
        shapes.clear()
        with torch.inference_mode():
            for cache in chain.from_iterable(llm.model_runner.kv_cache):
                cache.fill_(torch.nan)
            warm_up(llm.model_runner, use_graphs=False)
    first, *others = [one.tokens for one in shapes if one.is_prefill]
    assert first == max_tokens
    assert others == expected
