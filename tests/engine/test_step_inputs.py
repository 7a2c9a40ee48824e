"""The inputs of a step as the device would find them, with attention's plan and without."""

from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.checkpoints import VOCAB_SIZE, random_tokens
from helpers.engines import GREEDY, ORDERS, build
from helpers.shared_blocks import chunks_in, shared_pieces
from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.cuda_graphs import graph_rows
from nanovllm.engine.logit_edits import EditSlots
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import InputBuffers, StepInputs, StepShape
from nanovllm.kernels import shared_plan
from nanovllm.kernels.decode_plan import DecodePlan, plan_decode
from nanovllm.kernels.prefill_plan import PrefillPlan, max_prefill_words
from nanovllm.layers.attention_backends import TritonBackend

BLOCK, TILE = 16, 64
ROWS, EOS = 12, 0
LONG = SamplingParams(temperature=0.5, max_tokens=400, seed=3)


def prefilled(llm: LLM, lengths: list[int]) -> None:
    """Requests of some lengths, each after its prefill: the next batch is a decode batch."""
    for length in lengths:
        llm.add_request(random_tokens(length, seed=length), GREEDY)
    llm.step()


def send(llm: LLM, batch: Batch, padded_rows: int) -> tuple[StepShape, StepInputs]:
    """The inputs of a step as the device gets them."""
    inputs = llm.model_runner.inputs
    shape = fill_and_send(inputs, batch, padded_rows)
    return shape, inputs.view(shape)


def fill_and_send(
    inputs: InputBuffers, batch: Batch, padded_rows: int, fixed_shape: bool = False
) -> StepShape:
    shape, num_words = inputs.fill(batch, padded_rows, fixed_shape, {})
    inputs.send(inputs.buffer_index, num_words)
    return shape


@pytest.mark.parametrize("num_blocks", [60, 8])
def test_block_tables_are_those_of_the_rows(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: int
):
    """Whoever ends, comes, or is preempted: a decode step writes only those that have changed."""
    fill = InputBuffers.fill
    num_filled = 0

    def checked(inputs: InputBuffers, batch: Batch, *args: Any) -> tuple[StepShape, int]:
        nonlocal num_filled
        found = fill(inputs, batch, *args)
        if not batch.is_prefill:
            for seq, table in zip(batch.seqs, inputs._decode_rows.tables.tolist(), strict=True):
                assert table[: len(seq.block_table)] == seq.block_table
            num_filled += 1
        return found

    monkeypatch.setattr(InputBuffers, "fill", checked)
    with build(
        tiny, num_kvcache_blocks=num_blocks, max_model_len=128, max_num_seqs=5,
        async_scheduling=True,
    ) as llm:  # fmt: skip
        lengths = [5, 30, 16, 40, 9, 33, 47, 20]
        params = [SamplingParams(temperature=0, max_tokens=3 * n % 41 + 2) for n in lengths]
        prompts = [random_tokens(length, seed=length) for length in lengths]
        llm.generate(prompts, params, use_tqdm=False)
        assert num_filled > 30 and (num_blocks == 60) == (llm.scheduler.num_preemptions == 0)


# Positions, slots and bounds


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1])
@torch.inference_mode()
def test_decode_runs_the_newest_token_at_its_own_position_and_slot(tiny: Path, length: int):
    with build(tiny) as llm:
        prefilled(llm, [length])
        batch = llm.scheduler.schedule()
        (seq,) = batch.seqs
        shape, inputs = send(llm, batch, padded_rows=1)
        assert seq.token_ids[length:].tolist() == [inputs.input_ids.item()]
        assert inputs.positions.tolist() == [length]
        block_id = seq.block_table[length // BLOCK]
        assert inputs.slot_mapping.tolist() == [block_id * BLOCK + length % BLOCK]
        assert inputs.context_lens.tolist() == [length + 1]
        assert (shape.max_seqlen_q, shape.max_context_len) == (1, length + 1)


@torch.inference_mode()
def test_prefill_rows_have_their_own_positions_slots_and_bounds(tiny: Path):
    with build(tiny, max_num_batched_tokens=40) as llm:
        llm.add_request(random_tokens(20, seed=1), GREEDY)
        llm.add_request(random_tokens(50, seed=2), GREEDY)
        for expected in ([(0, 20), (0, 20)], [(20, 50)]):
            batch = llm.scheduler.schedule()
            shape, inputs = send(llm, batch, len(batch.seqs))
            positions = [p for start, end in expected for p in range(start, end)]
            slots = [
                seq.block_table[p // BLOCK] * BLOCK + p % BLOCK
                for seq, (start, end) in zip(batch.seqs, expected, strict=True)
                for p in range(start, end)
            ]
            assert inputs.positions.tolist() == positions
            assert inputs.slot_mapping.tolist() == slots
            assert inputs.context_lens.tolist() == [end for _, end in expected]
            lengths = [end - start for start, end in expected]
            assert inputs.cu_seqlens_q.diff().tolist() == lengths
            assert shape.max_seqlen_q == max(lengths)
            assert shape.max_context_len == max(end for _, end in expected)


@torch.inference_mode()
def test_padding_rows_point_at_no_slot_and_no_context(tiny: Path):
    with build(tiny) as llm:
        prefilled(llm, [5, 6, 7, 8, 9, 10, 11, 12])
        runner = llm.model_runner
        batch = llm.scheduler.schedule()
        for host in runner.inputs.hosts:  # what a larger batch may have left
            host.fill_(3)
        _, inputs = send(llm, batch, padded_rows=16)
        assert (inputs.slot_mapping[:8] >= 0).all()
        assert (inputs.slot_mapping[8:] == -1).all()
        assert (inputs.context_lens[8:] == 0).all()
        assert (inputs.positions[8:] == 0).all()
        assert (inputs.temperatures[8:] == 0).all()
        assert ((inputs.input_ids[8:] >= 0) & (inputs.input_ids[8:] < VOCAB_SIZE)).all()


@pytest.mark.parametrize("lengths", [[5], [5, 6], [5, 40, 33]])
@torch.inference_mode()
def test_block_tables_of_a_fixed_shape_are_as_wide_as_any(tiny: Path, lengths: list[int]):
    """As flash-attn's CUDA Graphs have them. What no block is needed for is block 0."""
    with build(tiny) as llm:
        prefilled(llm, lengths)
        inputs, batch = llm.model_runner.inputs, llm.scheduler.schedule()
        for host in inputs.hosts:  # what a prefill step may have left
            host.fill_(3000)
        shape = fill_and_send(inputs, batch, len(lengths), fixed_shape=True)
        assert shape == inputs.decode_shape(len(lengths))
        for table, seq in zip(inputs.view(shape).block_tables.tolist(), batch.seqs, strict=True):
            assert table[: len(seq.block_table)] == seq.block_table
            assert not any(table[len(seq.block_table) :])


# The plans


def triton_backend(num_ranges: int) -> TritonBackend:
    """As on a GPU with so many ranges."""
    backend = TritonBackend.__new__(TritonBackend)
    backend.block_size, backend.num_ranges = BLOCK, num_ranges
    backend.head_dim, backend.fp8_cache = 32, False
    return backend


def batches(llm: LLM, lengths: list[int]):
    """A prefill batch, then a decode batch, of prompts of some lengths."""
    for length in lengths:
        llm.add_request(random_tokens(length, seed=length), LONG)
    prefill = llm.scheduler.schedule()
    llm.scheduler.postprocess(prefill, [7] * len(lengths))
    return prefill, llm.scheduler.schedule()


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("max_num_seqs", [5, 7, 16])
def test_plan_is_sent_in_place_of_block_tables(tiny: Path, max_num_seqs: int, fixed_shape: bool):
    lengths = [1, 30, BLOCK, 200, 17]
    with build(tiny, max_num_seqs=max_num_seqs) as llm:
        buffers = InputBuffers(llm.config, triton_backend(6))
        prefill, decode = batches(llm, lengths)
        shape = fill_and_send(buffers, prefill, len(lengths))
        assert shape.width > 0
        tables = buffers.view(shape).block_tables.tolist()
        for table, seq in zip(tables, prefill.seqs, strict=True):
            used = -(-len(seq.token_ids) // BLOCK)
            assert table[:used] == seq.block_table[:used]

        padded_rows = min(8, max_num_seqs)
        for host in buffers.hosts:  # what a larger batch may have left
            host.fill_(3)
        shape = fill_and_send(buffers, decode, padded_rows, fixed_shape)
        assert shape.width == 0
        if fixed_shape:
            assert shape == buffers.decode_shape(padded_rows)
        inputs = buffers.view(shape)
        width = max(len(seq.block_table) for seq in decode.seqs)
        tables = np.zeros((len(lengths), width), dtype=np.int32)
        for row, seq in enumerate(decode.seqs):
            tables[row, : len(seq.block_table)] = seq.block_table
        plan = plan_decode(np.array(lengths) + 1, tables, BLOCK, TILE, 6, padded_rows)
        sent = buffers.backend.decode_metadata(inputs.rest, padded_rows)
        assert sent.bounds.tolist() == plan.bounds.tolist()
        tiles = sent.tiles[: len(plan.tiles)].numpy()
        assert chunks_in(plan._replace(tiles=tiles), TILE) == chunks_in(plan, TILE)
        padding = padded_rows - len(lengths)
        assert sent.chunk_counts.tolist() == plan.chunk_counts.tolist() + [0] * padding
        assert inputs.seeds[: len(lengths)].tolist() == [3] * len(lengths)
        assert inputs.temperatures.tolist() == [0.5] * len(lengths) + [0.0] * padding
        assert inputs.input_ids.tolist() == [7] * len(lengths) + [0] * padding
        assert inputs.slot_mapping[len(lengths) :].tolist() == [-1] * padding


def test_buffers_hold_the_largest_steps(tiny: Path):
    """As many rows as there may be, each as long as it may be."""
    with build(
        tiny, max_num_seqs=5, max_model_len=640, num_kvcache_blocks=220, max_num_batched_tokens=4000
    ) as llm:
        buffers = InputBuffers(llm.config, triton_backend(33))
        _, decode = batches(llm, [638] * 5)
        shape = fill_and_send(buffers, decode, 5, fixed_shape=True)
        metadata = buffers.view(shape).rest
        tiles = buffers.backend.decode_metadata(metadata, 5).tiles
        assert len(tiles) >= 5 * 10  # of 639 tokens
        assert (tiles[: 5 * 10, -1] >> 16).unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("num_found", "lengths"), [(0, [16, 1, 9]), (2 * BLOCK, [70, 17, 200]), (0, [639] * 6)]
)
def test_the_plan_of_a_prefill_step_is_sent(tiny: Path, num_found: int, lengths: list[int]):
    """Of prompts the first of which begins in the cache, and of as many tokens as there may be."""
    with build(
        tiny, max_num_seqs=6, max_model_len=640, num_kvcache_blocks=300,
        max_num_batched_tokens=sum(lengths) - num_found,
    ) as llm:  # fmt: skip
        prompts = [random_tokens(length, seed=i) for i, length in enumerate(lengths)]
        if num_found:
            llm.generate(prompts[0][: num_found + 1], GREEDY, use_tqdm=False)
        for prompt in prompts:
            llm.add_request(prompt, GREEDY)
        batch = llm.scheduler.schedule()
        assert batch.starts == [num_found] + [0] * (len(lengths) - 1)
        buffers = InputBuffers(llm.config, triton_backend(6))
        for host in buffers.hosts:  # what a larger batch may have left
            host.fill_(3)
        shape = fill_and_send(buffers, batch, len(lengths))
        sizes = shape.rows, shape.tokens, shape.max_seqlen_q, shape.max_context_len
        sent = buffers.backend.prefill_metadata(buffers.view(shape).rest, *sizes)
        plan = PrefillPlan.views(np.empty(max_prefill_words(*sizes[:2]), np.int32), *sizes)
        plan.fill(np.array(batch.starts), np.array(batch.lengths))
        assert sent.tiles.tolist() == plan.tiles.tolist() and sent[1:] == plan[1:]


def sharing_batch(llm: LLM, n: int, length: int, others: int = 2) -> Batch:
    """A decode batch of the completions of one prompt, and of other requests."""
    llm.add_request(random_tokens(length, seed=1), replace(LONG, n=n))
    for seed in range(others):
        llm.add_request(random_tokens(50, seed=10 + seed), LONG)
    while (batch := llm.scheduler.schedule()).is_prefill:
        llm.scheduler.postprocess(batch, [7] * len(batch.seqs))
    return batch


@pytest.mark.parametrize(("length", "fixed_shape"), [(601, False), (608, True)])
def test_completions_of_a_prompt_read_its_blocks_together(
    tiny: Path, length: int, fixed_shape: bool
):
    """All its full blocks, whatever chunks their length makes."""
    n = 10
    with build(tiny, max_num_seqs=16, num_kvcache_blocks=150) as llm:
        buffers = InputBuffers(llm.config, triton_backend(6))
        batch = sharing_batch(llm, n, length)
        for host in buffers.hosts:  # what a larger batch may have left
            host.fill_(3)
        shape = fill_and_send(buffers, batch, 16, fixed_shape)
        assert shape.shares
        metadata = buffers.view(shape).rest
        sent = buffers.backend.decode_metadata(metadata, 16, shape.shares)
        sent = DecodePlan(*(part.numpy() for part in sent))
        pieces = shared_pieces(sent)
        assert all(rows == list(range(n)) for rows, _, _ in pieces)
        assert sum(len(slots) for _, _, slots in pieces) == length // TILE * (TILE // BLOCK)
        chunks = chunks_in(sent, TILE)
        for row, (seq, start) in enumerate(zip(batch.seqs, batch.starts)):
            slots = [b * BLOCK + i for b in seq.block_table for i in range(BLOCK)][: start + 1]
            own = range(sent.chunk_counts[row])
            assert slots == [slot for chunk in own for slot in chunks[row, chunk]]
        assert buffers.backend.decode_metadata(metadata, 16).list_begin is None


@pytest.mark.parametrize(("n", "length", "rows"), [(1, 601, 16), (8, 40, 16), (4, 601, 4)])
def test_steps_that_share_too_little_have_the_shape_of_all_others(
    tiny: Path, n: int, length: int, rows: int
):
    with build(tiny, max_num_seqs=16, num_kvcache_blocks=150) as llm:
        buffers = InputBuffers(llm.config, triton_backend(6))
        batch = sharing_batch(llm, n, length, others=0)
        assert fill_and_send(buffers, batch, rows, True) == buffers.decode_shape(rows)


def test_without_a_prefix_cache_completions_have_the_chunks_of_other_requests(tiny: Path):
    with build(tiny, num_kvcache_blocks=400, enable_prefix_caching=False) as llm:
        buffers = InputBuffers(llm.config, triton_backend(6))
        batch = sharing_batch(llm, 8, 601)
        shape = fill_and_send(buffers, batch, 16, True)
        assert not shape.shares
        sent = buffers.backend.decode_metadata(buffers.view(shape).rest, 16)
        chunks = [3] * 8 + [1] * 2  # of 602 tokens and 51: with a border there would be one more
        assert sent.chunk_counts[: len(batch.seqs)].tolist() == chunks


# What is kept from step to step


class Run:
    """Requests of all kinds that come, go on, are preempted and end: a scheduler without a model,
    whose decode steps are filled in by buffers that have filled in all those before."""

    def __init__(self, seed: int, is_async: bool) -> None:
        self.random, self.is_async = np.random.default_rng(seed), is_async
        self.scheduler = Scheduler(BlockManager(60, BLOCK), ROWS, max_num_batched_tokens=256)
        self.config = SimpleNamespace(
            kvcache_block_size=BLOCK, enable_prefix_caching=True, max_model_len=1024,
            max_num_seqs=ROWS, max_num_batched_tokens=256, torch_device=torch.device("cpu"),
        )  # fmt: skip
        self.buffers = InputBuffers(self.config, triton_backend(6))
        self.slots = EditSlots(ROWS)
        self.in_flight: deque[Batch] = deque()
        self.launched: list[int] = []
        self.num_sequences = 0
        self.seen: Counter[str] = Counter()

    def add(self) -> None:
        random = self.random
        prompt = [7] * int(random.integers(100)) + random.integers(50, size=50).tolist()
        params = SamplingParams(
            temperature=float(random.random()), max_tokens=int(random.integers(1, 150)),
            top_k=int(random.integers(3)), n=int(random.choice([1, 1, 4])), ignore_eos=False,
            presence_penalty=float(random.choice([0, 0, 1])), min_p=float(random.random() / 2),
        )  # fmt: skip
        prompt *= 1 + 2 * (params.n > 1)
        for _ in range(params.n):
            max_len = len(prompt) + params.max_tokens
            number = self.num_sequences
            self.scheduler.add(Sequence(number, prompt, params, max_len, number**7, {EOS}))
            self.num_sequences += 1

    def step(self) -> None:
        batch = self.scheduler.schedule()
        if batch is not None:
            if batch.is_prefill:
                slots, _ = self.slots.of_batch(batch)
                self.buffers.fill(batch, len(batch.seqs), False, slots)
            else:
                self.check_decode(batch)
            self.launched = [seq.seq_id for seq in batch.seqs]
            self.in_flight.append(batch)
        if len(self.in_flight) > (batch is not None and self.is_async):
            oldest = self.in_flight.popleft()
            tokens = self.random.choice(
                [EOS, 1, 2, 3], len(oldest.seqs), p=[0.005, 0.4, 0.4, 0.195]
            )
            self.scheduler.postprocess(oldest, tokens.tolist())

    def check_decode(self, batch: Batch) -> None:
        """Exactly what is filled in by buffers that know of no step before but its rows."""
        rows, padded_rows = len(batch.seqs), graph_rows(len(batch.seqs), ROWS)
        slots, _ = self.slots.of_batch(batch)
        kept, fresh = self.buffers, InputBuffers(self.config, triton_backend(6))
        fresh._launched = self.launched
        found, expected = (
            (one, *one.fill(batch, padded_rows, True, slots)) for one in (kept, fresh)
        )
        assert found[1] == expected[1]
        one, other = (
            StepInputs.views(buffers.hosts[buffers.buffer_index].numpy(), shape)
            for buffers, shape, _ in (found, expected)
        )
        assert (
            one.buffer_index == kept.buffer_index and (one.seeds[:rows] == other.seeds[:rows]).all()
        )
        names = ["temperatures", "context_lens", "positions", "input_ids", "slot_mapping"]
        names += ["edit_slots"] + ["top_k", "top_p", "min_p"] * found[1].truncates
        for name in names:
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        # What is past the end of a context is anywhere: so the plan is that of the same tables.
        known = kept._decode_rows
        for seq, table in zip(batch.seqs, known.tables.tolist(), strict=True):
            assert table[: len(seq.block_table)] == seq.block_table
        ends = np.array(batch.starts) + 1
        again = np.zeros_like(one.rest)
        backend = triton_backend(6)
        num_words, shares = backend.prepare_decode(
            again, ends, known.tables, padded_rows, fresh._decode_rows.borders
        )
        assert found[2] == len(kept.hosts[0]) - len(one.rest) + num_words
        assert shares == found[1].shares and (one.rest[:num_words] == again[:num_words]).all()
        self.seen["goes_on"] += known.goes_on
        self.seen["moved"] += known.places.tolist() != [*range(rows)]
        self.seen["shares"] += shares
        self.seen["fused"] += padded_rows <= 4


@pytest.mark.parametrize("is_async", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_decode_step_is_the_same_whatever_was_before(
    seed: int, is_async: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_plan, "FEWEST_SPARED_TOKENS", 1)
    run = Run(seed, is_async)
    for _ in range(3):
        for number in range(200):
            if number < 150 and run.random.random() < 0.15:
                run.add()
            if run.random.random() < 0.02 and run.scheduler.running:
                run.scheduler.abort(run.random.choice(run.scheduler.running))
            run.step()
        # As after a step that has failed: the same blocks are given out for something else.
        run.scheduler.abort_all()
        run.in_flight.clear()
        run.buffers.forget()
        run.slots.clear()
    assert run.scheduler.num_preemptions
    assert all(run.seen[what] for what in ("goes_on", "moved", "shares", "fused")), run.seen
