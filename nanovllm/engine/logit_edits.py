"""What a request changes in its logits, and the slots on the device where it is written."""

import math
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanovllm.layers.edit_tables import IN_PROMPT, MOST_TIMES, Bias, SlotContents
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Batch
    from nanovllm.engine.sequence import Sequence


@dataclass(frozen=True)
class LogitEdits:
    """What a request changes before each sampling: resolved once, when it is queued.

    Attributes:
        params: the request's; `allowed_token_ids`, `logit_bias` and the penalties are read.
        changes_all: whether every token is sampled from changed logits; if not, those that come
            before `min_tokens` are.
        withheld: tokens that would end the request: not sampled before `min_tokens`.
    """

    params: SamplingParams
    changes_all: bool
    withheld: frozenset[int]

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: Collection[int]) -> "LogitEdits | None":
        """Those of a request; None if it wants nothing changed."""
        changes_all = params.penalizes or bool(params.logit_bias or params.allowed_token_ids)
        if not changes_all and not params.min_tokens:
            return None
        # EOS too, even if it is ignored, as in vLLM.
        withheld = frozenset(eos_token_ids).union(params.stop_token_ids or ())
        return cls(params, changes_all, withheld)

    def apply_to(self, num_generated: int) -> bool:
        """Whether the token after so many generated ones is sampled from changed logits."""
        return self.changes_all or self.params.is_below_min_tokens(num_generated)

    def contents(
        self, slot: int, prompt: array, generated: array, num_generated: int
    ) -> SlotContents:
        """For the slot of a request that has generated `num_generated` tokens.

        Args:
            generated: those that no step will count any more.
        """
        params = self.params
        seen = _seen(prompt, generated) if params.penalizes else None
        return SlotContents(slot, params.penalties, seen, self._bias(num_generated))

    def _bias(self, num_generated: int) -> Bias | None:
        params, default = self.params, 0.0
        values = dict(params.logit_bias or {})
        if params.allowed_token_ids is not None:
            default = -math.inf
            values = {token_id: values.get(token_id, 0.0) for token_id in params.allowed_token_ids}
        if params.is_below_min_tokens(num_generated):
            values |= dict.fromkeys(self.withheld, -math.inf)
        if not values and not default:
            return None
        token_ids = np.fromiter(values, np.int64, len(values))
        return Bias(default, token_ids, np.fromiter(values.values(), np.float32, len(values)))


def _seen(prompt: array, generated: array) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their entries of `EditTables.seen`."""
    in_prompt = np.unique(np.array(prompt, dtype=np.int64))
    token_ids, times = np.unique(np.array(generated, dtype=np.int64), return_counts=True)
    together = np.union1d(in_prompt, token_ids)
    entries = np.zeros(len(together), dtype=np.int64)
    entries[np.searchsorted(together, token_ids)] = np.minimum(times, MOST_TIMES)
    entries[np.searchsorted(together, in_prompt)] += IN_PROMPT
    return together, entries.astype(np.int16)


class EditSlots:
    """Which request has which slot.

    Args:
        number: of slots; as many as a step has rows at the most.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._free = list(range(number))
        self._slot_of: dict[int, int] = {}  # by seq_id
        self._owners: dict[int, Sequence] = {}  # by slot
        self._withholds: dict[int, bool] = {}  # by slot: it bans what would end the request

    def clear(self) -> None:
        """Take all slots back."""
        self._free = list(range(self._number))  # an interrupt may have lost one
        self._slot_of.clear()
        self._owners.clear()

    def of_batch(self, batch: "Batch") -> tuple[dict[int, int], list[SlotContents]]:
        """By row the slots of those that have one, and what has to be written before the step."""
        slots, contents = dict[int, int](), list[SlotContents]()
        for row in batch.wishful_rows:
            seq = batch.seqs[row]
            edits, num_tokens = seq.sampling.edits, batch.starts[row] + batch.lengths[row]
            num_generated = num_tokens - seq.num_prompt_tokens
            if edits is None:
                continue
            if not edits.apply_to(num_generated):
                self._take_back(seq)
                continue
            slot = self._slot_of.get(seq.seq_id)
            # Its tokens are all known when its prompt has been run, or was run again.
            is_new = batch.is_prefill or slot is None
            if slot is None:
                slot = self._give(seq, batch)
            withholds = edits.params.is_below_min_tokens(num_generated)
            if is_new or withholds is not self._withholds[slot]:
                num_counted = num_tokens - (not batch.is_prefill)
                prompt = seq.token_ids[: seq.num_prompt_tokens]
                generated = seq.token_ids[seq.num_prompt_tokens : num_counted]
                one = edits.contents(slot, prompt, generated, num_generated)
                contents.append(one if is_new else one._replace(seen=None))
            self._withholds[slot] = withholds
            slots[row] = slot
        return slots, contents

    def _give(self, seq: "Sequence", batch: "Batch") -> int:
        if not self._free:  # whoever has no row any more, or will begin again, needs none
            in_batch = {one.seq_id for one in batch.seqs}
            for owner in list(self._owners.values()):
                has_row = owner.is_running and not owner.is_ending
                if not has_row and owner.seq_id not in in_batch:
                    self._take_back(owner)
        slot = self._free.pop()
        self._slot_of[seq.seq_id], self._owners[slot] = slot, seq
        return slot

    def _take_back(self, seq: "Sequence") -> None:
        if (slot := self._slot_of.pop(seq.seq_id, None)) is not None:
            del self._owners[slot]
            self._free.append(slot)
