"""CUDA Graphs: a size for every batch, the same tokens from each, memory shared by all."""

from pathlib import Path

import pytest
import torch

from bench import dummy_llm
from helpers.checkpoints import Reference, random_tokens
from helpers.engines import build, greedy
from nanovllm import SamplingParams
from nanovllm.engine.cuda_graphs import graph_rows


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 9, 40])
def test_every_batch_has_a_graph_size_that_holds_it(max_num_seqs: int):
    sizes = [graph_rows(rows, max_num_seqs) for rows in range(1, max_num_seqs + 1)]
    for rows, size in enumerate(sizes, start=1):
        assert rows <= size <= max_num_seqs
    assert sizes == sorted(sizes)
    assert sizes[-1] == max_num_seqs


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
            for rows in (1, 2, 4, 8, *range(16, 256, 16)):
                shape = runner.inputs.decode_shape(rows)
                runner.graphs.run(shape)
        assert torch.cuda.memory_reserved() - before < 2**27
