"""Which sequences run in the next step: prompts (prefill), or if there are none to run, or running
sequences have waited for them long enough, one token of each running sequence (decode).

The scheduler plans from lengths and free blocks alone, never from sampled token values, so the
engine may plan and launch step N+1 before it has read the tokens of step N. What that costs is one
discarded row when a sequence turns out to have ended by EOS, and where its block was full the block
that this row takes; one that ends by length costs none.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.constraints import TokenConstraint
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.layers.sampler import NONE_LEFT, NOT_FINITE

# The most prefill steps in a row for which a sequence waits that could decode. See "Decode between
# prompts" in docs/performance.md for what a decode step between two of them costs.
MAX_PREFILL_STEPS = 8

# Why there is no token to sample, by what stands in its place: see `layers.sampler`.
_NO_TOKEN = {
    NOT_FINITE: "the model's logits have NaN or infinity: look for such weights in the checkpoint, "
    "or use a dtype with a wider range, as bfloat16 or float32 in place of float16",
    NONE_LEFT: "no token is left to sample: allowed_token_ids, bad_words, min_tokens and "
    "structured_outputs together rule all of them out",
}


@dataclass
class Batch:
    """One step's work: row `i` runs tokens `starts[i] : starts[i] + lengths[i]` of `seqs[i]`.

    In a decode batch every length is 1. A row that reaches the end of its sequence yields a token
    (`yields_token[i]`); a chunk of a longer prompt does not.
    """

    is_prefill: bool
    seqs: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    yields_token: list[bool] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def wishful_rows(self) -> list[int]:
        """Rows that want more than a token sampled from their logits as they are, and get one. To
        be read once the batch is complete."""
        rows = [row for row, seq in enumerate(self.seqs) if seq.has_wishes]
        return [row for row in rows if self.yields_token[row]]

    @cached_property
    def constraints(self) -> dict[int, TokenConstraint]:
        """Of those rows whose token the host restricts."""
        pairs = ((row, self.seqs[row].constraint) for row in self.wishful_rows)
        return {row: constraint for row, constraint in pairs if constraint is not None}

    def late_rows(self) -> list[int]:
        """Of these, the rows whose token cannot be what was sampled without asking the host, now
        that it knows the tokens before."""
        seqs = self.seqs
        return [
            row
            for row, constraint in self.constraints.items()
            if not seqs[row].is_finished
            and (seqs[row].sampling.edits is not None or not constraint.allows_all)
        ]


class Scheduler:
    """The waiting and running queues, and the rules by which sequences move between them.

    Args:
        block_manager: the pool of KV blocks.
        max_num_seqs: the most sequences that run at once; one whose last token is on the way does
            not count.
        max_num_batched_tokens: the most tokens of a prefill step; longer prompts run in chunks.
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission, the newest last
        self._prefill_steps_left = MAX_PREFILL_STEPS  # before a decode step
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0  # of all admitted so far

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that fits the cache on its own (the engine has checked that)."""
        self.waiting.append(seq)

    def schedule(self) -> Batch | None:
        """The next step's batch; None if nothing is queued, or if nothing can run before pending
        tokens are collected.

        Between two tokens of a sequence, unless it is preempted, there are at most
        `MAX_PREFILL_STEPS` steps that bring it none.
        """
        could_decode = any(map(self._can_decode, self.running))
        if not could_decode:
            self._prefill_steps_left = MAX_PREFILL_STEPS
        if self._prefill_steps_left:
            batch = self._schedule_prefill()
            if batch.seqs:
                if could_decode:
                    self._count_prefill_step(batch)
                return batch
        batch = self._schedule_decode()
        if not batch.seqs:
            return None
        self._prefill_steps_left = MAX_PREFILL_STEPS
        return batch

    def postprocess(self, batch: Batch, token_ids: list[int]) -> list[int]:
        """Append a step's tokens, one per row, to their sequences, and finish those that end by it.

        Returns the rows whose token counts: a chunk of a prompt yields none, a sequence may have
        ended while its row was already under way, or ends in an error, as no token can be sampled.
        """
        rows, block_size, finished = [], self.block_manager.block_size, SequenceStatus.FINISHED
        columns = zip(batch.seqs, batch.yields_token, token_ids, strict=True)
        for row, (seq, yields_token, token_id) in enumerate(columns):
            if not yields_token:
                continue
            seq.num_pending_tokens -= 1
            if seq.status is finished:
                continue
            if token_id < 0:  # there is none to sample
                self._finish(seq, "error", _NO_TOKEN[token_id])
                continue
            rows.append(row)
            num_written = len(seq.token_ids)  # all before the new one
            if num_written == seq.num_prompt_tokens:
                seq.first_token_time = time.time()
            seq.token_ids.append(token_id)
            if num_written % block_size == 0 and seq.block_table:  # they have filled a block
                self.block_manager.register(seq, num_written)
            if token_id in seq.ending_token_ids:
                is_eos = token_id in seq.eos_token_ids
                self._finish(seq, "stop", None if is_eos else token_id)
            elif num_written + 1 >= seq.max_len:
                self._finish(seq, "length")
        return rows

    def stop(self, seq: Sequence, stop_string: str) -> None:
        """End a sequence in whose text a stop string has come with its newest token. Where that is
        also the last token that fits, the stop string is the reason, as it says more."""
        if seq.is_finished:
            seq.finish_reason, seq.stop_reason = "stop", stop_string
        else:
            self._finish(seq, "stop", stop_string)

    def abort(self, seq: Sequence) -> None:
        """End a sequence, if it has not ended; what a step under way yields for it is discarded."""
        if not seq.is_finished:
            self._finish(seq, "abort")

    def abort_all(self) -> None:
        """End everything at once, whatever state a failed or interrupted step has left."""
        for seq in (*self.waiting, *self.running):
            seq.block_table.clear()
            seq.status, seq.finish_reason = SequenceStatus.FINISHED, "abort"
        self.waiting.clear()
        self.running.clear()
        self._prefill_steps_left = MAX_PREFILL_STEPS
        self.block_manager.reset()

    def _schedule_prefill(self) -> Batch:
        batch, budget = Batch(is_prefill=True), self.max_num_batched_tokens
        seats = self.max_num_seqs - len(self.running)
        if self.waiting:  # a sequence that is ending needs none
            seats += sum(seq.is_ending for seq in self.running)
        # Only the newest can be a prompt cut short by an earlier step's budget: it goes on first.
        if self.running and self._is_cut_prompt(self.running[-1]):
            budget -= self._add_row(batch, self.running[-1], budget)
        while self.waiting and budget > 0 and seats > 0:
            seq = self.waiting[0]
            # Each running sequence may soon want a block: without it, the newcomer would be
            # preempted.
            headroom = len(self.running)
            use_cache = not seq.needs_prompt_logprobs
            if not self.block_manager.allocate(seq, headroom, use_cache):
                break
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = seq.num_computed_tokens
                self.num_prompt_tokens += seq.num_prompt_tokens
                self.num_cached_tokens += seq.num_cached_tokens
            self.waiting.popleft()
            self.running.append(seq)
            seats -= 1
            seq.status = SequenceStatus.RUNNING
            budget -= self._add_row(batch, seq, budget)
        return batch

    def _count_prefill_step(self, batch: Batch) -> None:
        """Count a prefill step that running sequences wait for. Another one in a row pays only if
        it makes the decode batch larger: not if no prompt is left, nor if this one completed none.
        """
        is_full = batch.num_tokens == self.max_num_batched_tokens
        has_gained = is_full and any(batch.yields_token)
        self._prefill_steps_left = self._prefill_steps_left - 1 if has_gained else 0

    def _schedule_decode(self) -> Batch:
        seqs, starts, block_size = [], [], self.block_manager.block_size
        running = list(self.running)
        if running and self._is_cut_prompt(running[-1]):
            running.pop()
        for seq in running:
            start = seq.num_computed_tokens  # of all its tokens but one
            if start + 1 >= seq.max_len:
                continue  # its last token is on the way: ends by length cost no row
            if start == len(seq.block_table) * block_size:
                # The newest sequence is preempted until there is a block; it may be this one.
                while seq.status is SequenceStatus.RUNNING and not self.block_manager.append(seq):
                    self._preempt(self.running[-1])
                if seq.status is not SequenceStatus.RUNNING:
                    continue
            seqs.append(seq)
            starts.append(start)
            seq.num_computed_tokens = start + 1
            seq.num_pending_tokens += 1
        return Batch(False, seqs, starts, [1] * len(seqs), [True] * len(seqs))

    @staticmethod
    def _num_to_run(seq: Sequence) -> int:
        return seq.num_tokens - seq.num_computed_tokens

    @classmethod
    def _is_cut_prompt(cls, seq: Sequence) -> bool:
        """Whether some of its prompt is still to be run, if only one token; or, of a sequence that
        was preempted, more than its newest token."""
        return seq.num_computed_tokens < seq.num_prompt_tokens or cls._num_to_run(seq) > 1

    @classmethod
    def _can_decode(cls, seq: Sequence) -> bool:
        """Whether its newest token is all that is to be run, and is not its last one."""
        return seq.num_computed_tokens + 1 < seq.max_len and not cls._is_cut_prompt(seq)

    def _add_row(self, batch: Batch, seq: Sequence, budget: int) -> int:
        """Plan the next tokens of a prompt, at most `budget`, and count them as computed; returns
        how many."""
        start, length = seq.num_computed_tokens, min(self._num_to_run(seq), budget)
        yields_token = start + length == seq.num_tokens
        batch.seqs.append(seq)
        batch.starts.append(start)
        batch.lengths.append(length)
        batch.yields_token.append(yields_token)
        seq.num_computed_tokens += length
        if yields_token:
            seq.num_pending_tokens += 1
        # All these tokens are known, and so are the blocks they fill.
        self.block_manager.register(seq, seq.num_computed_tokens)
        return length

    def _preempt(self, seq: Sequence) -> None:
        """Send a sequence back to the head of the queue, to be computed again from its tokens."""
        self.running.remove(seq)
        self.block_manager.free(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        queue = self.running if seq.status is SequenceStatus.RUNNING else self.waiting
        queue.remove(seq)
        self.block_manager.free(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
