"""CUDA Graphs: a size for every batch, the same tokens from each, memory shared by all; those that
are recorded ahead while the device is busy."""

from pathlib import Path

import pytest
import torch

from bench import dummy_llm
from helpers.checkpoints import Reference, random_tokens
from helpers.engines import build, greedy
from nanovllm import LLM, SamplingParams
from nanovllm.engine import llm_engine
from nanovllm.engine.cuda_graphs import graph_rows, graph_sizes
from nanovllm.engine.step import PendingStep


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 9, 40])
def test_every_batch_has_a_graph_size_that_holds_it(max_num_seqs: int):
    sizes = [graph_rows(rows, max_num_seqs) for rows in range(1, max_num_seqs + 1)]
    for rows, size in enumerate(sizes, start=1):
        assert rows <= size <= max_num_seqs
    assert sizes == sorted(sizes)
    assert sizes[-1] == max_num_seqs


def test_sizes_are_few_and_padding_is_less_than_half():
    assert len(graph_sizes(512)) == 16
    for rows in range(1, 1025):
        padding = graph_rows(rows, 1024) - rows
        assert padding < min(64, max(rows, 16)), rows


@pytest.mark.gpu
@pytest.mark.parametrize("max_num_seqs", [7, 21, 40])
def test_batch_sizes_between_graph_sizes_give_the_same_tokens(tiny: Path, max_num_seqs: int):
    """The batch shrinks by one at a time, through every size, as the requests end."""
    reference = Reference(tiny, "cuda")
    prompts = [random_tokens(3 + i % 5, seed=i) for i in range(max_num_seqs)]
    params = [SamplingParams(temperature=0, max_tokens=2 + i) for i in range(max_num_seqs)]
    expected = [
        reference.tokens(prompt, param.max_tokens) for prompt, param in zip(prompts, params)
    ]
    with build(
        tiny, device="cuda", attention_backend="triton", max_num_seqs=max_num_seqs,
        num_kvcache_blocks=200,
    ) as llm:  # fmt: skip
        assert greedy(llm, prompts, params) == expected  # captures
        assert greedy(llm, prompts[::-1], params[::-1]) == expected[::-1]  # replays


@pytest.mark.gpu
def test_graphs_of_all_sizes_share_their_memory():
    changes = {"num_hidden_layers": 2}
    with dummy_llm("qwen3-0.6b", changes, num_kvcache_blocks=8, max_num_seqs=256) as llm:
        runner = llm.model_runner
        before = torch.cuda.memory_reserved()
        with torch.inference_mode():
            for rows in graph_sizes(256)[:-1]:
                shape = runner.inputs.decode_shape(rows)
                runner.graphs.run(shape)
        assert torch.cuda.memory_reserved() - before < 2**27


# Ahead


class FakeGraphs:
    """Stands for `CudaGraphs` where there is no GPU."""

    def __init__(self, llm: LLM, sizes: list[int]) -> None:
        shapes = (llm.model_runner.inputs.decode_shape(rows) for rows in sizes)
        self.left = {shape._replace(truncates=True) for shape in shapes}
        self.captured: list[int] = []

    def can_capture(self, shape) -> bool:
        return shape in self.left

    def capture(self, shape) -> None:
        self.left.remove(shape)
        self.captured.append(shape.rows)


@pytest.mark.parametrize(
    ("num_seqs", "expected"),
    [(5, [8, 4, 2, 1]), (8, [8, 4, 2, 1]), (1, [1]), (99, [12, 8, 4, 2, 1])],
)
def test_sizes_that_a_batch_shrinks_to_are_captured_ahead_the_largest_first(
    tiny: Path, num_seqs: int, expected: list[int]
):
    with build(tiny, max_num_seqs=12) as llm:
        graphs = FakeGraphs(llm, graph_sizes(12))
        llm.model_runner.graphs = graphs
        like = llm.model_runner.inputs.decode_shape(3, truncates=True)
        while llm.model_runner.capture_ahead(num_seqs, like):
            assert len(graphs.captured) <= 5
        assert graphs.captured == expected
        assert not llm.model_runner.capture_ahead(num_seqs, like._replace(truncates=False))
        assert not llm.model_runner.capture_ahead(num_seqs, like._replace(edits=True))
        llm.model_runner.graphs = None
        assert not llm.model_runner.capture_ahead(num_seqs, like)


def calls_of_capture_ahead(llm: LLM, num_prompts: int, max_tokens: int, busy: int) -> list[int]:
    """How many sequences each call was told of. `busy`: so often the device is asked before it is
    done with a step."""
    calls, asked = [], [0]

    def capture_ahead(num_seqs: int, like: object) -> bool:
        calls.append(num_seqs)
        return True

    def is_done(step: PendingStep) -> bool:
        asked[0] += 1
        return asked[0] > busy

    llm.model_runner.capture_ahead = capture_ahead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingStep, "is_done", property(is_done))
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        greedy(llm, [random_tokens(20, seed=i) for i in range(num_prompts)], params)
    return calls


@pytest.mark.parametrize(
    ("num_prompts", "max_tokens", "busy", "expected"),
    [
        (3, 4, 5, [3] * 5),  # as long as the device is busy
        (3, 4, 0, []),
        (1, 4, 5, []),  # no step is before it, and it is followed by none that is long
        (3, 1, 5, []),  # no decode step will come
    ],
)  # fmt: skip
def test_graphs_are_captured_while_long_prefill_steps_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch,
    num_prompts: int, max_tokens: int, busy: int, expected: list[int],
):  # fmt: skip
    monkeypatch.setattr(llm_engine, "LONG_STEP", 20)
    with build(tiny, max_num_batched_tokens=20, async_scheduling=True) as llm:
        assert calls_of_capture_ahead(llm, num_prompts, max_tokens, busy) == expected


def test_short_prefill_steps_wait_for_no_capture(tiny: Path):
    with build(tiny, max_num_batched_tokens=20, async_scheduling=True) as llm:
        assert calls_of_capture_ahead(llm, 3, 4, busy=5) == []


@pytest.mark.gpu
def test_graphs_captured_ahead_give_the_same_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    reference = Reference(tiny, "cuda")
    prompts = [random_tokens(20, seed=i) for i in range(9)]
    params = [SamplingParams(temperature=0, max_tokens=2 + i) for i in range(9)]
    expected = [
        reference.tokens(prompt, param.max_tokens) for prompt, param in zip(prompts, params)
    ]
    monkeypatch.setattr(llm_engine, "LONG_STEP", 20)
    monkeypatch.setattr(PendingStep, "is_done", property(lambda step: False))
    with build(
        tiny, device="cuda", attention_backend="triton", max_num_seqs=40,
        max_num_batched_tokens=60, num_kvcache_blocks=200,
    ) as llm:  # fmt: skip
        runner, before_decode = llm.model_runner, []
        launch = runner.launch

        def spy(batch, *args):
            if not batch.is_prefill and not before_decode:
                before_decode.extend(sorted(shape.rows for shape in runner.graphs.graphs))
            return launch(batch, *args)

        runner.launch = spy
        assert greedy(llm, prompts, params) == expected
        assert before_decode == [1, 2, 4, 8, 16, 40]
        assert greedy(llm, prompts[::-1], params[::-1]) == expected[::-1]
