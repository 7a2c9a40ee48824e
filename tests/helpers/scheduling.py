"""A scheduler on a model of the device, which knows what every slot of the KV cache holds."""

import hashlib
from collections import deque

from helpers.blocks import assert_blocks_consistent
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams

EOS = 3  # of the alphabet 0, 1, 2, 3


def next_token(seed: int, token_ids: list[int]) -> int:
    """The "model": a function of the request's seed and of all tokens before. EOS now and then."""
    digest = hashlib.sha256(bytes([seed, *token_ids])).digest()
    return EOS if digest[0] < 24 else digest[1] % 2


def expected_output(seq: Sequence, prompt: list[int]) -> tuple[list[int], str]:
    """What a request must come to, run alone: its new tokens and its finish reason."""
    token_ids = list(prompt)
    while len(token_ids) < seq.max_len:
        token_ids.append(next_token(seq.seed, token_ids))
        if token_ids[-1] == EOS and not seq.sampling_params.ignore_eos:
            return token_ids[len(prompt) :], "stop"
    return token_ids[len(prompt) :], "length"


class FakeDevice:
    """Runs batches. A slot holds the whole text up to the token whose keys were written there."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: dict[int, tuple[int, ...]] = {}
        self.token_ids: dict[int, list[int]] = {}  # by sequence, ahead of the host by a step
        self.num_sampled: dict[int, int] = {}

    def launch(self, batch: Batch) -> list[int]:
        """Write all rows, then read all rows, as a layer does; returns a token a row."""
        written: set[int] = set()
        for seq, start, length in zip(batch.seqs, batch.starts, batch.lengths, strict=True):
            token_ids = seq.token_ids.tolist()
            known = self.token_ids.setdefault(seq.seq_id, list(token_ids))
            assert known[: len(token_ids)] == token_ids
            assert start + length <= len(known), "a row runs a token that nobody has sampled"
            for position in range(start, start + length):
                block_id = seq.block_table[position // self.manager.block_size]
                assert self.manager.blocks[block_id].ref_count >= 1
                slot = self.slot(seq, position)
                assert slot not in written, "a slot is written twice in a step"
                written.add(slot)
                self.slots[slot] = tuple(known[: position + 1])
        tokens = []
        for row, seq in enumerate(batch.seqs):
            end, known = batch.starts[row] + batch.lengths[row], self.token_ids[seq.seq_id]
            for position in range(end):
                held = self.slots.get(self.slot(seq, position))
                assert held == tuple(known[: position + 1]), "a row reads what is not its own"
            assert batch.yields_token[row] == (end == len(known))
            token_id = next_token(seq.seed, known[:end])
            tokens.append(token_id)
            if batch.yields_token[row]:
                known.append(token_id)
                self.num_sampled[seq.seq_id] = self.num_sampled.get(seq.seq_id, 0) + 1
                assert len(known) <= seq.max_len, "a row too many for a sequence at its length"
        return tokens

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.manager.block_size
        return seq.block_table[position // size] * size + position % size


class Driver:
    """Does what the engine does, in any order it may do it, and checks each step's plan."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.manager, max_num_seqs, budget)
        self.device = FakeDevice(self.manager)
        self.in_flight: deque[tuple[Batch, list[int]]] = deque()
        self.waits = False  # nothing can run before tokens are collected
        self.sequences: list[Sequence] = []
        self.prompts: list[list[int]] = []
        self.admitted: list[int] = []
        # By seq_id, since its last token: of those that have one and are to have another.
        self.steps_waited: dict[int, int] = {}
        self.longest_wait = 0
        self.ended: list[Sequence] = []

    def add(self, prompt: list[int], max_tokens: int, ignore_eos: bool, seed: int) -> Sequence:
        capacity = len(self.manager.blocks) * self.manager.block_size
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        prompt = prompt[: capacity - 1]
        max_len = min(len(prompt) + max_tokens, capacity)
        seq = Sequence(len(self.sequences), prompt, params, max_len, seed, {EOS})
        self.scheduler.add(seq)
        self.sequences.append(seq)
        self.prompts.append(prompt)
        return seq

    def schedule(self) -> Batch | None:
        running = list(self.scheduler.running)
        waiting = list(self.scheduler.waiting)
        finished = [seq for seq in self.sequences if seq.is_finished]
        preemptions = self.scheduler.num_preemptions
        batch = self.scheduler.schedule()
        for seq in self.scheduler.running:
            if seq.seq_id not in self.admitted:
                self.admitted.append(seq.seq_id)
        assert self.admitted == sorted(self.admitted), "not first come, first served"
        preempted = [seq for seq in running if seq.status is SequenceStatus.WAITING]
        assert preempted == running[len(running) - len(preempted) :], "not the newest preempted"
        assert self.scheduler.num_preemptions - preemptions == len(preempted)
        if preempted:
            assert list(self.scheduler.waiting) == preempted + waiting
        self.waits = batch is None
        if batch is None:
            assert self.in_flight or not self.scheduler.num_unfinished, "stuck: nothing can run"
            return None
        assert not any(seq in finished for seq in batch.seqs), "a finished sequence is scheduled"
        assert all(seq in self.scheduler.running for seq in batch.seqs)
        self.check_plan(batch)
        self.in_flight.append((batch, self.device.launch(batch)))
        self.check_waits(batch)
        return batch

    def check_waits(self, batch: Batch) -> None:
        """Prefill steps in a row are few, and one where more of them gain nothing."""
        limit = scheduler_module.MAX_PREFILL_STEPS
        is_full = batch.num_tokens == self.scheduler.max_num_batched_tokens
        has_gained = is_full and any(batch.yields_token)
        waited, self.steps_waited = self.steps_waited, {}
        for seq in self.scheduler.running:
            if seq in batch.seqs:
                has_token = batch.yields_token[batch.seqs.index(seq)]
                number = 0
            else:
                has_token = seq.seq_id in waited
                number = waited.get(seq.seq_id, 0) + 1
            if has_token and len(self.device.token_ids[seq.seq_id]) < seq.max_len:
                assert number <= limit, f"{seq.seq_id} waits for a token"
                self.longest_wait = max(self.longest_wait, number)
                self.steps_waited[seq.seq_id] = number if has_gained or not number else limit

    def check_plan(self, batch: Batch) -> None:
        scheduler = self.scheduler
        assert 1 <= len(batch.seqs) <= scheduler.max_num_seqs
        assert len({seq.seq_id for seq in batch.seqs}) == len(batch.seqs)
        has_rows = [seq for seq in scheduler.running if not seq.is_ending]
        assert len({*has_rows, *batch.seqs}) <= scheduler.max_num_seqs
        assert min(batch.lengths) >= 1
        if not batch.is_prefill:
            assert set(batch.lengths) == {1} and all(batch.yields_token)
            return
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert all(batch.yields_token[:-1]), "only the last prompt of a step may be cut"
        if not batch.yields_token[-1]:
            assert batch.num_tokens == scheduler.max_num_batched_tokens, "cut, with budget left"
        for seq, start, length in zip(batch.seqs, batch.starts, batch.lengths):
            for position in range(start, start + length):
                block = self.manager.blocks[seq.block_table[position // self.manager.block_size]]
                # A second holder is one that found the block in this very step, full.
                sharers = [s for s in batch.seqs if block.block_id in s.block_table]
                assert block.ref_count == len(sharers)
                assert block.ref_count == 1 or block.is_registered

    def collect(self) -> list[Sequence]:
        batch, tokens = self.in_flight.popleft()
        self.waits = False
        was_finished = {seq.seq_id for seq in batch.seqs if seq.is_finished}
        lengths = {seq.seq_id: len(seq.token_ids) for seq in batch.seqs}
        rows = self.scheduler.postprocess(batch, tokens)
        ended = [batch.seqs[row] for row in rows if batch.seqs[row].is_finished]
        for seq, samples in zip(batch.seqs, batch.yields_token):
            grown = len(seq.token_ids) - lengths[seq.seq_id]
            assert grown == (samples and seq.seq_id not in was_finished)
        for seq in ended:
            assert seq.is_finished and not seq.block_table
            expected = expected_output(seq, self.prompts[seq.seq_id])
            assert (seq.output_token_ids, seq.finish_reason) == expected
            assert seq.seq_id not in was_finished
        self.ended += ended
        return ended

    def check_invariants(self) -> None:
        scheduler = self.scheduler
        assert_blocks_consistent(self.manager, scheduler.running)
        for seq in scheduler.running:
            assert seq.status is SequenceStatus.RUNNING and seq.block_table
        for seq in scheduler.waiting:
            assert seq.status is SequenceStatus.WAITING and not seq.block_table
        for seq in self.sequences:
            on_the_way = [
                samples
                for batch, _ in self.in_flight
                for other, samples in zip(batch.seqs, batch.yields_token)
                if other is seq
            ]
            assert seq.num_pending_tokens == sum(on_the_way), "pending tokens are miscounted"
            assert seq.num_tokens <= seq.max_len + seq.is_finished
        size = self.manager.block_size
        for block in self.manager.block_of_hash.values():
            # What can be found holds, on the device, what its name says.
            held = self.device.slots[block.block_id * size + size - 1]
            assert held[-size:] == tuple(block.token_ids)

    def drain(self, depth: int) -> None:
        """Run to the end, with up to `depth` steps in flight when the next is planned."""
        work = sum(seq.max_len for seq in self.sequences)
        limit = 20 + 10 * work
        while self.scheduler.num_unfinished or self.in_flight:
            limit -= 1
            assert limit, "no end in sight"
            if self.waits or len(self.in_flight) > depth or not self.scheduler.num_unfinished:
                self.collect()
            elif self.schedule() is None and not self.in_flight:
                break
            self.check_invariants()
        self.check_end()

    def check_end(self) -> None:
        assert len(self.ended) == len(self.sequences)
        assert self.manager.num_free_blocks == len(self.manager.blocks), "blocks are lost"
        assert not self.scheduler.running and not self.scheduler.waiting
        for seq in self.sequences:
            assert seq.num_pending_tokens == 0
            assert 0 <= seq.num_cached_tokens < seq.num_prompt_tokens
            surplus = self.device.num_sampled[seq.seq_id] - len(seq.output_token_ids)
            if seq.finish_reason == "length":
                assert surplus == 0
            else:
                assert surplus <= 1
