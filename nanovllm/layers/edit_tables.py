"""Changes of the logits before sampling, as they lie on the device: penalties, biases, masks.

A request that changes its logits has a slot while it runs: a row of each table. What it is to
change is written there once, and its generated tokens are counted there by the steps themselves, so
no step waits until the host knows a token. Only masks, of what may come next, are the host's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.memory import to_device

IN_PROMPT = -(2**15)  # of an entry of `EditTables.seen`
MOST_TIMES = 2**15 - 1
_MOST_SENT = 2**20  # entries at a time: they take memory on the device
NO_PENALTIES = (1.0, 0.0, 0.0)


class Bias(NamedTuple):
    """What is added to the logits of a request.

    Attributes:
        default: to those of all tokens that are not named; -inf bans them.
        token_ids, values: [number] int64 and float32.
    """

    default: float
    token_ids: np.ndarray
    values: np.ndarray


class SlotContents(NamedTuple):
    """What a request is to change, for `EditTables.write`.

    Attributes:
        slot: of the request.
        penalties: repetition, presence and frequency penalty; see `SamplingParams`.
        seen: token ids [number] int64, no two alike, and their entries of `EditTables.seen`
            [number] int16. None without penalties, or if the slot has them already.
        bias: None if nothing is added.
    """

    slot: int
    penalties: tuple[float, float, float]
    seen: tuple[np.ndarray, np.ndarray] | None
    bias: Bias | None


class RowEdits(NamedTuple):
    """Which rows of a step have their logits changed.

    Attributes:
        slots: [rows] int32; -1 for rows that change nothing.
        newest: [rows] int32, tokens not counted yet; -1 - i stands for token i of the step before.
            None in prefill steps: all tokens are counted.
        mask_places: [rows] int32, each row's place among the masks, -1 for none. None if no row has
            one. A row with a mask has a slot, be it the neutral one.
    """

    slots: torch.Tensor
    newest: torch.Tensor | None
    mask_places: torch.Tensor | None


class EditTables:
    """Memory is taken when the first request needs it; see `num_bytes`.

    Args:
        max_rows: of a step, and so the number of slots.
        device: of the logits.
        vocab_size: columns of the logits.
        first_token: the token of the first column.
        mask_size: tokens of a mask: the whole vocabulary.

    Attributes:
        options: [slots + 1, 4] float32: repetition, presence and frequency penalty; 1 if there is a
            bias. The last slot is neutral: it changes nothing.
        seen: [slots, vocab] int16: how often the token was generated, at most `MOST_TIMES`; the
            sign bit is set if it is in the prompt.
        bias: [slots, vocab] float32.
        masks: [max_rows, words] int32, of rows in no order; bit i % 32 of word i // 32 is set if
            token i may come.
        mask_places: [max_rows] int32: of rows that are in the order of their masks.
    """

    options: torch.Tensor
    seen: torch.Tensor
    bias: torch.Tensor
    masks: torch.Tensor
    mask_places: torch.Tensor

    def __init__(
        self,
        max_rows: int,
        device: torch.device,
        vocab_size: int,
        first_token: int = 0,
        mask_size: int | None = None,
    ) -> None:
        self.max_rows, self.device = max_rows, device
        self.vocab_size, self.first_token = vocab_size, first_token
        self.num_words = -(-(mask_size or vocab_size) // 32)
        self._is_allocated = False

    @property
    def num_bytes(self) -> int:
        """Of all tables, once they are there."""
        return self.max_rows * (16 + (2 + 4 + 4) * self.vocab_size + 4 * self.num_words)

    def write(self, contents: list[SlotContents]) -> None:
        """Write slots, each with all that it is to hold, without waiting for the device."""
        self._allocate()
        biases = [(one.slot, one.bias) for one in contents if one.bias is not None]
        seen = [(one.slot, *one.seen) for one in contents if one.seen is not None]
        options = np.array([(*one.penalties, one.bias is not None) for one in contents])
        slots = self._sent([one.slot for one in contents])
        self.options[slots] = self._sent(options, np.float32)
        for default in {bias.default for _, bias in biases}:
            own = [slot for slot, bias in biases if bias.default == default]
            # Not by an assignment: it would send its value, and wait for the device.
            self.bias.index_fill_(0, self._sent(own), default)
        if seen:
            self.seen.index_fill_(0, self._sent([slot for slot, *_ in seen]), 0)
            self._put(self.seen, seen, np.int16)
        if biases:
            named = [(slot, bias.token_ids, bias.values) for slot, bias in biases]
            self._put(self.bias, named, np.float32)

    def host_masks(self, number: int) -> np.ndarray:
        """[number, words] int32, to be filled for `send_masks`. Those sent before must have been
        used."""
        self._allocate()
        return self._host_masks[:number].numpy()

    def send_masks(self, number: int) -> None:
        """Send so many masks to the device, beside what it is doing."""
        here = self.masks[:number]
        if self._stream is None:
            here.copy_(self._host_masks[:number])
            return
        with torch.cuda.stream(self._stream):
            here.copy_(self._host_masks[:number], non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def edited(self, logits: torch.Tensor, edits: RowEdits, sampled: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] as they are to be sampled from, in float32.

        The formulas of the penalties are OpenAI's (presence, frequency) and those of Keskar et al.
        2019, arXiv:1909.05858 (repetition).

        Args:
            sampled: [rows or more] int64, the tokens of the step before.
        """
        self._allocate()
        out = self._logits[: len(logits)]
        if has_kernels(logits):
            kernels.edit_logits(logits, *edits[:2], sampled, edits.mask_places, self, out)
            return out
        out.copy_(logits)
        for row, slot in self._rows_with_slots(edits):
            newest = None
            if edits.newest is not None:
                newest = int(edits.newest[row])
                newest = (newest if newest >= 0 else int(sampled[-1 - newest])) - self.first_token
            out[row] = self._edited_row(out[row], slot, newest)
            if edits.mask_places is not None and (place := int(edits.mask_places[row])) >= 0:
                out[row].masked_fill_(~self._may_come(place), float("-inf"))
        return out

    def _edited_row(self, x: torch.Tensor, slot: int, newest: int | None) -> torch.Tensor:
        """[vocab] float32; `newest` is a column, or outside of them."""
        repetition, presence, frequency, has_bias = self.options[slot].tolist()
        if has_bias:
            x = x + self.bias[slot]
        if (repetition, presence, frequency) == NO_PENALTIES:
            return x
        seen = self.seen[slot]
        if newest is not None and 0 <= newest < len(seen):
            seen[newest] += int(seen[newest]) & MOST_TIMES < MOST_TIMES
        times = (seen & MOST_TIMES).float()
        repeated = torch.where(x > 0, x / repetition, x * repetition)
        x = torch.where(seen != 0, repeated, x)
        return x - (times * frequency + presence * (times > 0))

    def _may_come(self, place: int) -> torch.Tensor:
        """[vocab] bool."""
        bits = np.unpackbits(self.masks[place].numpy().view(np.uint8), bitorder="little")
        return torch.from_numpy(bits)[self.first_token :][: self.vocab_size].bool()

    @staticmethod
    def _rows_with_slots(edits: RowEdits) -> Iterator[tuple[int, int]]:
        return ((row, slot) for row, slot in enumerate(edits.slots.tolist()) if slot >= 0)

    def _put(
        self, table: torch.Tensor, entries: list[tuple[int, np.ndarray, np.ndarray]], dtype: type
    ) -> None:
        """Write (slot, token ids, values) to a table."""
        places, values = [], []
        for slot, token_ids, own in entries:
            column = token_ids - self.first_token
            is_here = (column >= 0) & (column < self.vocab_size)
            places.append(slot * self.vocab_size + column[is_here])
            values.append(own[is_here])
        flat, all_places, all_values = (
            table.view(-1),
            np.concatenate(places),
            np.concatenate(values),
        )
        for start in range(0, len(all_places), _MOST_SENT):
            piece = slice(start, start + _MOST_SENT)
            flat[self._sent(all_places[piece])] = self._sent(all_values[piece], dtype)

    def _sent(self, values: np.ndarray | list[int], dtype: type = np.int64) -> torch.Tensor:
        return to_device(values, self.device, dtype)

    def _allocate(self) -> None:
        if self._is_allocated:
            return
        slots, on_gpu = self.max_rows, self.device.type == "cuda"
        shape = (slots, self.vocab_size)
        self.options = torch.zeros(slots + 1, 4, device=self.device)
        self.options[slots, 0] = 1
        self.seen = torch.zeros(shape, dtype=torch.int16, device=self.device)
        self.bias = torch.zeros(shape, device=self.device)
        self._logits = torch.empty(shape, device=self.device)
        masks = (slots, self.num_words)
        self.masks = torch.zeros(masks, dtype=torch.int32, device=self.device)
        self.mask_places = torch.arange(slots, dtype=torch.int32, device=self.device)
        self._host_masks = torch.zeros(masks, dtype=torch.int32, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._is_allocated = True
