"""What the device needs to know of a step: filled in with NumPy, sent in one copy."""

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.kernels.paged_decode import max_tiles, plan_decode


class StepShape(NamedTuple):
    """Sizes of a step's inputs, from which alone `StepInputs.carve` lays them out."""

    is_prefill: bool
    rows: int  # padding included
    tokens: int
    width: int  # columns of the block tables; 0 in a step with a decode plan
    max_seqlen_q: int
    max_context_len: int
    truncates: bool = False  # sampling by top_k, top_p or min_p
    has_head: bool = True  # False: ends before it, with the residual stream

    @property
    def has_plan(self) -> bool:
        return self.width == 0


class StepInputs(NamedTuple):
    """Views of one int32 buffer, of torch on the device and of NumPy on the host."""

    seeds: Any  # [rows] int64
    temperatures: Any  # [rows] float32
    top_k: Any  # [rows], this and the next two for steps that truncate
    top_p: Any  # [rows] float32
    min_p: Any  # [rows] float32
    context_lens: Any  # [rows]
    chunk_counts: Any  # [rows], of the decode plan
    cu_seqlens_q: Any  # [rows + 1]
    bounds: Any  # [ranges + 1], of the decode plan
    turn: Any  # [1], 0 or 1: where the host wants the tokens
    input_ids: Any  # [tokens]; -1 - i stands for token i of the previous step
    positions: Any  # [tokens]
    slot_mapping: Any  # [tokens]
    block_tables: Any  # [rows, width]
    tiles: Any  # [any number, 2], of the decode plan: what is left of the buffer

    @staticmethod
    def words(shape: StepShape, num_ranges: int) -> list[int]:
        """int32 words of each field but the last."""
        rows, tokens = shape.rows, shape.tokens
        return [
            2 * rows, *[rows] * 6, rows + 1, num_ranges + 1, 1, *[tokens] * 3, rows * shape.width,
        ]  # fmt: skip

    @classmethod
    def carve(cls, buffer: Any, shape: StepShape, num_ranges: int) -> "StepInputs":
        pieces, start = [], 0
        for size in cls.words(shape, num_ranges):
            pieces.append(buffer[start : start + size])
            start += _aligned(size)
        dtypes = np if isinstance(buffer, np.ndarray) else torch
        pieces[0] = pieces[0].view(dtypes.int64)
        for index in (1, 3, 4):
            pieces[index] = pieces[index].view(dtypes.float32)
        pieces[-1] = pieces[-1].reshape(shape.rows, shape.width)
        return cls(*pieces, buffer[start:].reshape(-1, 2))


def _aligned(size: int) -> int:
    """Kernels are compiled for addresses that are multiples of 16 bytes."""
    return -(-size // 4) * 4


class InputBuffers:
    """Host and device memory for the inputs of steps, at fixed places, as CUDA Graphs need them.

    The host has two buffers, taken in turns, since the device may still be reading the one of the
    last step; two steps back, all is read.

    Args:
        config: the engine's options.
        num_ranges: of the decode plan; 0 if the attention backend wants block tables instead.
    """

    def __init__(self, config: Config, num_ranges: int) -> None:
        self.block_size = config.kvcache_block_size
        self.max_model_len = config.max_model_len
        self.max_width = -(-config.max_model_len // self.block_size)
        self.num_ranges = num_ranges
        rows = config.max_num_seqs
        tokens = max(config.max_num_batched_tokens, rows)
        prefill = StepShape(True, rows, tokens, self.max_width, tokens, self.max_model_len)
        size, decode_size = (
            sum(map(_aligned, StepInputs.words(shape, num_ranges)))
            for shape in (prefill, self.decode_shape(rows))
        )
        if num_ranges:
            decode_size += 2 * max_tiles(rows, self.max_model_len, self.block_size)
        size = max(size, decode_size)
        on_gpu = config.torch_device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int32, device=config.torch_device)
        self.hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self.turn = 0
        self._tables = np.zeros((rows, self.max_width), dtype=np.int32)

    def decode_shape(self, rows: int) -> StepShape:
        """A decode step of any contexts: the shape of a CUDA Graph."""
        width = 0 if self.num_ranges else self.max_width
        return StepShape(False, rows, rows, width, 1, self.max_model_len)

    def send(
        self,
        batch: Batch,
        padded_rows: int,
        launched_rows: dict[int, int],
        for_graph: bool,
    ) -> StepShape:
        """Fill this turn's host buffer with a batch, and copy it to the device.

        Args:
            padded_rows: rows to run; those past the batch write nowhere and attend to nothing.
            launched_rows: where each sequence was in the step before, whose tokens are not known.
            for_graph: the shape is to depend on `padded_rows` and the sampler's business alone.
        """
        self.turn = 1 - self.turn
        rows, block_size = len(batch.seqs), self.block_size
        starts, lengths = np.array(batch.starts), np.array(batch.lengths)
        ends = starts + lengths
        truncates, has_head = batch.truncates, not batch.needs_logits
        if for_graph:
            shape = self.decode_shape(padded_rows)._replace(
                truncates=truncates and has_head, has_head=has_head
            )
        else:
            has_plan = self.num_ranges > 0 and not batch.is_prefill
            width = 0 if has_plan else max(len(seq.block_table) for seq in batch.seqs)
            tokens = batch.num_tokens if batch.is_prefill else padded_rows
            shape = StepShape(
                batch.is_prefill, padded_rows, tokens, width, max(batch.lengths), int(ends.max()),
                truncates and has_head, has_head,
            )  # fmt: skip
        buffer = self.hosts[self.turn].numpy()
        host = StepInputs.carve(buffer, shape, self.num_ranges)

        host.turn[0] = self.turn
        host.seeds[:rows] = [seq.seed for seq in batch.seqs]
        host.temperatures[:rows] = [seq.temperature for seq in batch.seqs]
        if truncates:
            params = [seq.sampling_params for seq in batch.seqs]
            host.top_k[:rows] = [min(param.top_k, 2**31 - 1) for param in params]
            host.top_p[:rows] = [param.top_p for param in params]
            host.min_p[:rows] = [param.min_p for param in params]
            host.top_k[rows:], host.top_p[rows:], host.min_p[rows:] = 0, 1, 0
        host.context_lens[:rows] = ends
        host.cu_seqlens_q[0] = 0
        np.cumsum(lengths, out=host.cu_seqlens_q[1 : rows + 1])
        for row, seq in enumerate(batch.seqs):
            self._tables[row, : len(seq.block_table)] = seq.block_table
        row_of_token = np.repeat(np.arange(rows), lengths)
        real_tokens = len(row_of_token)
        positions = np.arange(real_tokens) + (starts - host.cu_seqlens_q[:rows])[row_of_token]
        host.positions[:real_tokens] = positions
        blocks = self._tables[row_of_token, positions // block_size]
        host.slot_mapping[:real_tokens] = blocks * block_size + positions % block_size
        if batch.is_prefill:
            spans = (seq.token_ids[s:e] for seq, s, e in zip(batch.seqs, batch.starts, ends))
            host.input_ids[:] = list(chain.from_iterable(spans))
        else:
            host.input_ids[:rows] = [
                seq.token_ids[start]
                if start < len(seq.token_ids)
                else -1 - launched_rows[seq.seq_id]
                for seq, start in zip(batch.seqs, batch.starts)
            ]
        host.block_tables[:rows] = self._tables[:rows, : shape.width]
        if padded_rows > rows:
            host.slot_mapping[rows:] = -1
            for piece in (host.context_lens, host.positions, host.input_ids, host.temperatures):
                piece[rows:padded_rows] = 0
        used = len(buffer) - host.tiles.size
        if shape.has_plan:
            plan = plan_decode(ends, self._tables[:rows], block_size, self.num_ranges, padded_rows)
            host.bounds[:] = plan.bounds
            host.chunk_counts[:rows], host.chunk_counts[rows:] = plan.chunk_counts, 0
            host.tiles[: len(plan.tiles)] = plan.tiles
            used += plan.tiles.size
        self.device[:used].copy_(self.hosts[self.turn][:used], non_blocking=True)
        return shape

    def view(self, shape: StepShape) -> StepInputs:
        """The inputs as they are on the device."""
        return StepInputs.carve(self.device, shape, self.num_ranges)
