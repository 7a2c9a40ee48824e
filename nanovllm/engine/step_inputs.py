"""What the device needs to know of a step: filled in with NumPy, sent in one copy."""

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import RowSampling
from nanovllm.layers.attention_backends import AttentionBackend
from nanovllm.layers.edit_tables import RowEdits
from nanovllm.layers.sampler import SamplingInputs

_NUMPY_TYPES = {"f": np.float32, "l": np.int64}
_TORCH_TYPES = {"f": torch.float32, "l": torch.int64}


class StepShape(NamedTuple):
    """Sizes of a step's inputs, from which alone `StepInputs.views` lays them out."""

    is_prefill: bool
    rows: int  # padding included
    tokens: int
    width: int  # columns of the block tables
    max_seqlen_q: int
    max_context_len: int
    truncates: bool = False  # sampling by top_k, top_p or min_p
    edits: bool = False  # some rows have a slot of `EditTables`
    shares: bool = False  # some rows read blocks that they share together


class StepInputs(NamedTuple):
    """Views of one int32 buffer, of torch on the device and of NumPy on the host."""

    seeds: Any  # [rows] int64
    temperatures: Any  # [rows] float32
    top_k: Any  # [rows], this and the next two for steps that truncate
    top_p: Any  # [rows] float32
    min_p: Any  # [rows] float32
    edit_slots: Any  # [rows] of `EditTables`, -1: none
    late_slots: Any  # [rows] of those that may be sampled late
    context_lens: Any  # [rows]
    cu_seqlens_q: Any  # [rows + 1]
    buffer_index: Any  # [1], 0 or 1: which of the host's buffers the tokens go to
    input_ids: Any  # [tokens]; -1 - i stands for token i of the previous step
    positions: Any  # [tokens]
    slot_mapping: Any  # [tokens]
    block_tables: Any  # [rows, width]
    rest: Any  # of the buffer; in decode steps it begins with the attention backend's metadata

    @staticmethod
    def layout(shape: StepShape) -> list[tuple[int, str]]:
        """int32 words of each field but the last, in order, and what they are: "i" for int32, "f"
        for float32, "l" for int64."""
        rows, tokens = shape.rows, shape.tokens
        return [
            (2 * rows, "l"), (rows, "f"), (rows, "i"), (rows, "f"), (rows, "f"), (rows, "i"),
            (rows, "i"), (rows, "i"), (rows + 1, "i"), (1, "i"), (tokens, "i"), (tokens, "i"),
            (tokens, "i"), (rows * shape.width, "i"),
        ]  # fmt: skip

    @classmethod
    def words(cls, shape: StepShape) -> int:
        """int32 words of all fields but the last."""
        return sum(_aligned(size) for size, _ in cls.layout(shape))

    @classmethod
    def views(cls, buffer: Any, shape: StepShape) -> "StepInputs":
        """The fields, one after the other in a buffer of NumPy or torch."""
        types = _NUMPY_TYPES if isinstance(buffer, np.ndarray) else _TORCH_TYPES
        pieces, start = [], 0
        for size, kind in cls.layout(shape):
            piece = buffer[start : start + size]
            pieces.append(piece if kind == "i" else piece.view(types[kind]))
            start += _aligned(size)
        pieces[-1] = pieces[-1].reshape(shape.rows, shape.width)  # the block tables
        return cls._make([*pieces, buffer[start:]])

    def sampling(self, shape: StepShape) -> SamplingInputs:
        newest = None if shape.is_prefill else self.input_ids
        edits = RowEdits(self.edit_slots, newest, None)
        return SamplingInputs(
            temperatures=self.temperatures, seeds=self.seeds,
            positions=self.context_lens,  # the token that is sampled stands where the context ends
            top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, truncates=shape.truncates,
            edits=edits if shape.edits else None, buffer_index=self.buffer_index,
        )  # fmt: skip

    def late_sampling(
        self,
        shape: StepShape,
        rows: torch.Tensor | slice,
        newest: torch.Tensor | None,
        mask_places: torch.Tensor,
    ) -> SamplingInputs:
        """Of some rows, once their masks are known. See `RowEdits` for `newest` and `mask_places`,
        an entry for each of `rows`."""
        edits = RowEdits(self.late_slots[rows], newest, mask_places)
        return self.sampling(shape)._replace(edits=edits).of_rows(rows)


def _aligned(size: int) -> int:
    """Kernels are compiled for addresses that are multiples of 16 bytes."""
    return -(-size // 4) * 4


class InputBuffers:
    """Host and device memory for the inputs of steps, at fixed places, as CUDA Graphs need them.

    The host has two buffers, taken in turns, since the device may still be reading the one of the
    last step; two steps back, all is read.

    Args:
        config: the engine's options.
        backend: prepares what attention needs besides.
    """

    def __init__(self, config: Config, backend: AttentionBackend) -> None:
        self.backend = backend
        self.block_size = config.kvcache_block_size
        self.shares_prefixes = config.enable_prefix_caching
        self.max_model_len = config.max_model_len
        self.max_width = -(-config.max_model_len // self.block_size)
        rows = self.neutral_slot = config.max_num_seqs
        tokens = max(config.max_num_batched_tokens, rows)
        prefill = StepShape(True, rows, tokens, self.max_width, tokens, self.max_model_len)
        prefill_size, decode_size = (
            StepInputs.words(shape) for shape in (prefill, self.decode_shape(rows))
        )
        decode_size += backend.max_metadata_words(rows, self.max_model_len)
        size = max(prefill_size, decode_size)
        on_gpu = config.torch_device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int32, device=config.torch_device)
        self.hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self.buffer_index = 0
        # Of the newest batch; past the end of a row's table lie entries of older ones.
        self._tables = np.zeros((rows, self.max_width), dtype=np.int32)

    def decode_shape(self, rows: int, truncates: bool = False) -> StepShape:
        """A decode step of any contexts: the shape of a CUDA Graph."""
        width = self.max_width if self.backend.reads_tables_in_decode else 0
        return StepShape(False, rows, rows, width, 1, self.max_model_len, truncates)

    def fill(
        self,
        batch: Batch,
        padded_rows: int,
        launched_rows: dict[int, int],
        fixed_shape: bool,
        edit_slots: list[int],
    ) -> tuple[StepShape, int]:
        """Fill the host buffer whose turn it is with a batch, for `send`.

        Args:
            padded_rows: rows to run; those past the batch write nowhere and attend to nothing.
            launched_rows: where each sequence was in the step before, whose tokens are not known.
            fixed_shape: the shape is to depend on `padded_rows` and on how rows are sampled alone,
                as a CUDA Graph's must.
            edit_slots: of each row, -1 for none.

        Returns:
            The step's shape, and how many words of the buffer are in use.
        """
        self.buffer_index = 1 - self.buffer_index
        starts, lengths = np.array(batch.starts), np.array(batch.lengths)
        ends = starts + lengths
        truncates = True in [row.truncates for row in batch.sampling]
        if fixed_shape:
            shape = self.decode_shape(padded_rows)
        else:
            reads_tables = batch.is_prefill or self.backend.reads_tables_in_decode
            width = max(len(seq.block_table) for seq in batch.seqs) if reads_tables else 0
            tokens = batch.num_tokens if batch.is_prefill else padded_rows
            shape = StepShape(
                batch.is_prefill, padded_rows, tokens, width, max(batch.lengths), int(ends.max())
            )
        late_rows = np.array([*batch.constraints], np.int64)
        slots = np.array(edit_slots)
        late_slots, slots[late_rows] = slots[late_rows], -1
        shape = shape._replace(truncates=truncates, edits=bool(slots.max() >= 0))
        buffer = self.hosts[self.buffer_index].numpy()
        host = StepInputs.views(buffer, shape)
        host.buffer_index[0] = self.buffer_index
        self._fill_sampling(host, batch.sampling, truncates)
        host.edit_slots[: len(slots)] = slots
        host.late_slots[late_rows] = np.where(late_slots < 0, self.neutral_slot, late_slots)
        self._fill_rows(host, batch, starts, lengths, shape, launched_rows)
        self._fill_tokens(host, batch, launched_rows)
        if padded_rows > len(batch.seqs):
            self._fill_padding(host, len(batch.seqs), truncates)
        used = len(buffer) - len(host.rest)
        if not batch.is_prefill:
            num_words, shares = self.backend.prepare_decode(
                host.rest, ends, self._tables[: len(batch.seqs)], padded_rows,
                self._borders(batch, padded_rows),
            )  # fmt: skip
            used += num_words
            shape = shape._replace(shares=shares)
        return shape, used

    def may_share(self, padded_rows: int) -> bool:
        """Whether rows of a decode step may read blocks that they share together."""
        return self.shares_prefixes and self.backend.may_share(padded_rows)

    def send(self, buffer_index: int, used: int) -> None:
        """Copy the words of a host buffer that are in use to the device."""
        self.device[:used].copy_(self.hosts[buffer_index][:used], non_blocking=True)

    def view(self, shape: StepShape) -> StepInputs:
        """The inputs as they are on the device."""
        return StepInputs.views(self.device, shape)

    def _borders(self, batch: Batch, padded_rows: int) -> np.ndarray | None:
        """[rows], the tokens in full blocks that a row may share with others of its request."""
        if not self.may_share(padded_rows):
            return None
        common = [seq.num_prompt_tokens if seq.has_siblings else 0 for seq in batch.seqs]
        return np.array(common) // self.block_size * self.block_size

    @staticmethod
    def _fill_sampling(host: StepInputs, sampling: list[RowSampling], truncates: bool) -> None:
        rows = len(sampling)
        host.seeds[:rows] = [row.seed for row in sampling]
        host.temperatures[:rows] = [row.temperature for row in sampling]
        if truncates:
            host.top_k[:rows] = [row.top_k for row in sampling]
            host.top_p[:rows] = [row.top_p for row in sampling]
            host.min_p[:rows] = [row.min_p for row in sampling]

    def _fill_rows(
        self,
        host: StepInputs,
        batch: Batch,
        starts: np.ndarray,
        lengths: np.ndarray,
        shape: StepShape,
        launched_rows: dict[int, int],
    ) -> None:
        """Contexts, block tables, and where each token stands and is stored."""
        rows = len(batch.seqs)
        host.context_lens[:rows] = starts + lengths
        host.cu_seqlens_q[0] = 0
        np.cumsum(lengths, out=host.cu_seqlens_q[1 : rows + 1])
        for row, (seq, start) in enumerate(zip(batch.seqs, batch.starts)):
            # Else it is as in the step before: tables change only where a block begins.
            if launched_rows.get(seq.seq_id) != row or start % self.block_size == 0:
                self._tables[row, : len(seq.block_table)] = seq.block_table
        row_of_token = np.repeat(np.arange(rows), lengths)
        num_tokens = len(row_of_token)
        positions = np.arange(num_tokens) + (starts - host.cu_seqlens_q[:rows])[row_of_token]
        host.positions[:num_tokens] = positions
        blocks = self._tables[row_of_token, positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        if batch.is_prefill:
            found = np.array([seq.num_found_tokens for seq in batch.seqs])
            slots[positions < found[row_of_token]] = -1
        host.slot_mapping[:num_tokens] = slots
        host.block_tables[:rows] = self._tables[:rows, : shape.width]

    @staticmethod
    def _fill_tokens(host: StepInputs, batch: Batch, launched_rows: dict[int, int]) -> None:
        if batch.is_prefill:
            spans = (
                seq.token_ids[start : start + length]
                for seq, start, length in zip(batch.seqs, batch.starts, batch.lengths)
            )
            host.input_ids[:] = list(chain.from_iterable(spans))
        else:
            rows = len(batch.seqs)
            host.input_ids[:rows] = [
                seq.token_ids[start]
                if start < len(seq.token_ids)
                else -1 - launched_rows[seq.seq_id]
                for seq, start in zip(batch.seqs, batch.starts)
            ]

    @staticmethod
    def _fill_padding(host: StepInputs, rows: int, truncates: bool) -> None:
        """Decode rows past the batch: they write nowhere, attend to nothing and are greedy, and so
        read no seed."""
        for field in (host.slot_mapping, host.edit_slots):
            field[rows:] = -1
        for field in (host.context_lens, host.positions, host.input_ids, host.temperatures):
            field[rows:] = 0
        if truncates:
            host.top_k[rows:], host.top_p[rows:], host.min_p[rows:] = 0, 1, 0
