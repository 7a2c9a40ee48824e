"""What runs before the first request, on a CPU with what it asks of a GPU stood in for."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.engines import GREEDY, build, greedy
from nanovllm.engine import warm_up as warm_up_module
from nanovllm.engine.cuda_graphs import graph_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step_inputs import StepShape
from nanovllm.engine.warm_up import compile_ahead, warm_up

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
            (False, 8, 8), (True, 1, 64), (False, 8, 8)
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
