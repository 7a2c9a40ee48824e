"""What the device needs to know of a step: filled in with NumPy, sent in one copy."""

from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_rows import ROW, DecodeRows, row_of
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
    cu_seqlens_q: Any  # [rows + 1], in prefill
    buffer_index: Any  # [1], 0 or 1: which of the host's buffers the tokens go to
    input_ids: Any  # [tokens]; -1 - i stands for token i of the previous step
    positions: Any  # [tokens]
    slot_mapping: Any  # [tokens]
    block_tables: Any  # [rows, width]
    rest: Any  # of the buffer; it begins with the attention backend's metadata

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
        prefill_size += backend.max_prefill_words(rows, tokens)
        decode_size += backend.max_decode_words(rows, self.max_model_len)
        size = max(prefill_size, decode_size)
        on_gpu = config.torch_device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int32, device=config.torch_device)
        self.hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self.buffer_index = 0
        self._decode_rows = DecodeRows(rows, self.block_size)
        self._launched: list[int] = []  # seq_id of each row of the newest step of any kind
        self._arrays = [host.numpy() for host in self.hosts]
        self._views: list[tuple[tuple[int, ...], StepInputs] | None] = [None, None]  # of each

    def decode_shape(self, rows: int, truncates: bool = False) -> StepShape:
        """A decode step of any contexts: the shape of a CUDA Graph."""
        width = self.max_width if self.backend.reads_tables_in_decode else 0
        return StepShape(False, rows, rows, width, 1, self.max_model_len, truncates)

    def fill(
        self, batch: Batch, padded_rows: int, fixed_shape: bool, edit_slots: dict[int, int]
    ) -> tuple[StepShape, int]:
        """Fill the host buffer whose turn it is with a batch, for `send`.

        Args:
            padded_rows: rows to run; those past the batch write nowhere and attend to nothing. In
                prefill there are none.
            fixed_shape: the shape is to depend on `padded_rows` and on how rows are sampled alone,
                as a CUDA Graph's must.
            edit_slots: by row, of those that have one.

        Returns:
            The step's shape, and how many words of the buffer are in use.
        """
        self.buffer_index = 1 - self.buffer_index
        if not batch.is_prefill:
            return self._fill_decode(batch, padded_rows, fixed_shape, edit_slots)
        self._launched = [seq.seq_id for seq in batch.seqs]
        return self._fill_prefill(batch, edit_slots)

    def forget(self) -> None:
        """The steps so far count no more: what the next one needs is written anew."""
        self._launched = []
        self._decode_rows.forget()

    def may_share(self, padded_rows: int) -> bool:
        """Whether rows of a decode step may read blocks that they share together."""
        return self.shares_prefixes and self.backend.may_share(padded_rows)

    def send(self, buffer_index: int, used: int) -> None:
        """Copy the words of a host buffer that are in use to the device."""
        self.device[:used].copy_(self.hosts[buffer_index][:used], non_blocking=True)

    def view(self, shape: StepShape) -> StepInputs:
        """The inputs as they are on the device."""
        return StepInputs.views(self.device, shape)

    def _fill_prefill(self, batch: Batch, edit_slots: dict[int, int]) -> tuple[StepShape, int]:
        seqs = batch.seqs
        width = max(len(seq.block_table) for seq in seqs)
        starts, lengths = (np.array(one, np.int32) for one in (batch.starts, batch.lengths))
        ends = starts + lengths
        shape = StepShape(
            True, len(seqs), batch.num_tokens, width, max(batch.lengths), int(ends.max())
        )
        host = self._host(shape)
        rows = np.array([row_of(*row, self.block_size) for row in zip(seqs, batch.starts)], ROW)
        truncates = bool(rows["truncates"].any())
        self._fill_sampling(host, rows, truncates)
        edits = self._fill_edits(host, batch, edit_slots)
        host.context_lens[:] = ends
        host.cu_seqlens_q[0] = 0
        np.cumsum(lengths, out=host.cu_seqlens_q[1:])
        host.block_tables[:] = 0
        for table, seq in zip(host.block_tables, seqs):
            table[: len(seq.block_table)] = seq.block_table
        spans = zip(seqs, batch.starts, batch.lengths)
        pieces = (seq.token_ids[start : start + length] for seq, start, length in spans)
        host.input_ids[:] = np.frombuffer(b"".join(pieces), np.uint32)
        places = np.arange(shape.tokens, dtype=np.int32)
        positions = places + np.repeat(starts - host.cu_seqlens_q[:-1], lengths)
        host.positions[:] = positions
        columns = positions // self.block_size
        tables = np.arange(len(seqs), dtype=np.int32) * width  # where each begins
        blocks = host.block_tables.take(columns + np.repeat(tables, lengths))
        slots = blocks * self.block_size + (positions - columns * self.block_size)
        found = np.array([seq.num_found_tokens for seq in seqs], np.int32)
        slots[positions < np.repeat(found, lengths)] = -1
        host.slot_mapping[:] = slots
        num_words = self.backend.prepare_prefill(host.rest, starts, lengths)
        used = len(self._arrays[self.buffer_index]) - len(host.rest) + num_words
        return shape._replace(truncates=truncates, edits=edits), used

    def _fill_decode(
        self, batch: Batch, padded_rows: int, fixed_shape: bool, edit_slots: dict[int, int]
    ) -> tuple[StepShape, int]:
        kept, number = self._decode_rows, len(batch.seqs)
        is_after_decode = self._launched is kept.seq_ids  # no prefill step since
        kept.update(batch)
        starts = kept.rows["start"]
        ends = starts + 1
        shape = self.decode_shape(padded_rows)
        if not fixed_shape:
            longest = int(ends.max())
            width = -(-longest // self.block_size) if shape.width else 0
            shape = shape._replace(width=width, max_context_len=longest)
        host = self._host(shape)
        self._fill_sampling(host, kept.rows, kept.truncates)
        edits = self._fill_edits(host, batch, edit_slots)
        host.context_lens[:number] = ends
        host.input_ids[:number] = self._newest_tokens(batch, is_after_decode)
        self._launched = kept.seq_ids
        host.positions[:number] = starts
        host.slot_mapping[:number] = kept.slots()
        width = min(shape.width, kept.tables.shape[1])
        host.block_tables[:number, :width] = kept.tables[:, :width]
        host.block_tables[:number, width:] = 0  # in use by no context, and a block all the same
        if padded_rows > number:
            self._fill_padding(host, number, kept.truncates)
        num_words, shares = self.backend.prepare_decode(
            host.rest, ends, kept.tables, padded_rows,
            kept.borders if self.may_share(padded_rows) else None, kept.goes_on,
        )  # fmt: skip
        used = len(self._arrays[self.buffer_index]) - len(host.rest) + num_words
        return shape._replace(truncates=kept.truncates, edits=edits, shares=shares), used

    def _host(self, shape: StepShape) -> StepInputs:
        """Views of the host buffer whose turn it is, mostly those of its last step."""
        index, layout = self.buffer_index, (shape.rows, shape.tokens, shape.width)
        last = self._views[index]
        if last is None or last[0] != layout:
            last = layout, StepInputs.views(self._arrays[index], shape)
            self._views[index] = last
        last[1].buffer_index[0] = index
        return last[1]

    def _newest_tokens(self, batch: Batch, is_after_decode: bool) -> np.ndarray | list[int]:
        """The tokens that a decode step runs; -1 - i for row i of the step before, whose token the
        host does not have yet."""
        seqs, starts, places = batch.seqs, batch.starts, self._decode_rows.places
        # A step's tokens come all at once: where one is on its way, all are.
        if is_after_decode and starts[0] >= len(seqs[0].token_ids) and places.min() >= 0:
            return -1 - places
        place_of = dict(zip(self._launched, range(len(self._launched))))
        return [
            known[start] if start < len(known := seq.token_ids) else -1 - place_of[seq.seq_id]
            for seq, start in zip(seqs, starts)
        ]

    def _fill_edits(self, host: StepInputs, batch: Batch, slots: dict[int, int]) -> bool:
        """Which row has which slot. Returns whether any is to be read with the first sampling."""
        host.edit_slots[:] = -1
        if slots:
            host.edit_slots[[*slots]] = [*slots.values()]
        if batch.constraints:
            late_rows = [*batch.constraints]
            late_slots = host.edit_slots[late_rows]
            host.late_slots[late_rows] = np.where(late_slots < 0, self.neutral_slot, late_slots)
            host.edit_slots[late_rows] = -1
        return bool(slots) and int(host.edit_slots.max()) >= 0

    @staticmethod
    def _fill_sampling(host: StepInputs, rows: np.ndarray, truncates: bool) -> None:
        number = len(rows)
        host.seeds[:number], host.temperatures[:number] = rows["seed"], rows["temperature"]
        if truncates:
            for name in ("top_k", "top_p", "min_p"):
                getattr(host, name)[:number] = rows[name]

    @staticmethod
    def _fill_padding(host: StepInputs, rows: int, truncates: bool) -> None:
        """Decode rows past the batch: they write nowhere, attend to nothing and are greedy, and so
        read no seed."""
        host.slot_mapping[rows:] = -1
        for field in (host.context_lens, host.positions, host.input_ids, host.temperatures):
            field[rows:] = 0
        if truncates:
            host.top_k[rows:], host.top_p[rows:], host.min_p[rows:] = 0, 1, 0
