"""The inputs of a step as the device would find them, with a decode plan and without."""

from pathlib import Path

import numpy as np
import pytest
from test_known_faults import BLOCK, build

from helpers.checkpoints import random_tokens
from nanovllm import LLM, SamplingParams
from nanovllm.engine.step_inputs import InputBuffers
from nanovllm.kernels.paged_decode import plan_decode

LONG = SamplingParams(temperature=0.5, max_tokens=400, seed=3)


def batches(llm: LLM, lengths: list[int]):
    """A prefill batch, then a decode batch, of prompts of some lengths."""
    for length in lengths:
        llm.add_request(random_tokens(length, seed=length), LONG)
    prefill = llm.scheduler.schedule()
    llm.scheduler.postprocess(prefill, [7] * len(lengths))
    return prefill, llm.scheduler.schedule()


@pytest.mark.parametrize("for_graph", [False, True])
@pytest.mark.parametrize("max_num_seqs", [5, 7, 16])
def test_plan_is_sent_in_place_of_block_tables(tiny: Path, max_num_seqs: int, for_graph: bool):
    lengths = [1, 30, BLOCK, 200, 17]
    with build(tiny, max_num_seqs=max_num_seqs) as llm:
        buffers = InputBuffers(llm.config, num_ranges=6)
        prefill, decode = batches(llm, lengths)
        shape = buffers.send(prefill, len(lengths), {}, for_graph=False)
        assert not shape.has_plan
        tables = buffers.view(shape).block_tables.tolist()
        for table, seq in zip(tables, prefill.seqs, strict=True):
            used = -(-len(seq.token_ids) // BLOCK)
            assert table[:used] == seq.block_table[:used]

        padded_rows = min(8, max_num_seqs)
        for host in buffers.hosts:  # what a larger batch may have left
            host.fill_(3)
        shape = buffers.send(decode, padded_rows, {}, for_graph)
        assert shape.has_plan
        if for_graph:
            assert shape == buffers.decode_shape(padded_rows)
        inputs = buffers.view(shape)
        width = max(len(seq.block_table) for seq in decode.seqs)
        tables = np.zeros((len(lengths), width), dtype=np.int32)
        for row, seq in enumerate(decode.seqs):
            tables[row, : len(seq.block_table)] = seq.block_table
        plan = plan_decode(np.array(lengths) + 1, tables, BLOCK, 6, padded_rows)
        assert inputs.bounds.tolist() == plan.bounds.tolist()
        assert inputs.tiles[: len(plan.tiles)].tolist() == plan.tiles.tolist()
        padding = padded_rows - len(lengths)
        assert inputs.chunk_counts.tolist() == plan.chunk_counts.tolist() + [0] * padding
        assert inputs.seeds[: len(lengths)].tolist() == [3] * len(lengths)
        assert inputs.temperatures.tolist() == [0.5] * len(lengths) + [0.0] * padding
        assert inputs.input_ids.tolist() == [7] * len(lengths) + [0] * padding
        assert inputs.slot_mapping[len(lengths) :].tolist() == [-1] * padding


def test_buffers_hold_the_largest_steps(tiny: Path):
    """As many rows as there may be, each as long as it may be."""
    with build(
        tiny, max_num_seqs=5, max_model_len=640, num_kvcache_blocks=220, max_num_batched_tokens=4000
    ) as llm:
        buffers = InputBuffers(llm.config, num_ranges=33)
        _, decode = batches(llm, [638] * 5)
        shape = buffers.send(decode, 5, {}, for_graph=True)
        tiles = buffers.view(shape).tiles
        assert len(tiles) >= 5 * 639 // BLOCK
        assert (tiles[: 5 * 639 // BLOCK, 1] >> 16).unique().tolist() == [0, 1, 2, 3, 4]
