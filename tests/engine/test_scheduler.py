"""The scheduler against a model of the device that knows what every slot of the KV cache holds."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.blocks import MACHINE_SETTINGS, assert_blocks_consistent
from helpers.scheduling import EOS, Driver, next_token
from nanovllm.engine.sequence import SequenceStatus


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come at any time; with `depth` 1, a step is planned while one is in flight."""

    depth = 0

    @initialize(
        num_blocks=st.integers(2, 8),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
    )
    def build(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> None:
        self.driver = Driver(num_blocks, block_size, max_num_seqs, budget)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 10),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 2),
    )
    def add(self, prompt: list[int], max_tokens: int, ignore_eos: bool, seed: int) -> None:
        self.driver.add(prompt, max_tokens, ignore_eos, seed)

    @rule(prompt=st.integers(0, 1), length=st.integers(1, 12), max_tokens=st.integers(1, 10))
    def add_two_equal(self, prompt: int, length: int, max_tokens: int) -> None:
        for _ in range(2):
            self.driver.add([prompt] * length, max_tokens, True, 0)

    @precondition(lambda self: len(self.driver.in_flight) <= self.depth and not self.driver.waits)
    @rule()
    def schedule(self) -> None:
        self.driver.schedule()
        if not self.driver.in_flight:
            self.driver.waits = False

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def collect(self) -> None:
        self.driver.collect()

    @invariant()
    def invariants_hold(self) -> None:
        self.driver.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain(self.depth)


class AsyncSchedulerMachine(SchedulerMachine):
    """The order of `async_scheduling`: step N + 1 is planned before the tokens of step N."""

    depth = 1


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = MACHINE_SETTINGS
TestAsyncScheduler = AsyncSchedulerMachine.TestCase
TestAsyncScheduler.settings = MACHINE_SETTINGS

DEPTHS = pytest.mark.parametrize("depth", [0, 1], ids=["sync", "async"])


@DEPTHS
def test_prompt_is_cut_exactly_at_the_budget(depth: int):
    driver = Driver(num_blocks=8, block_size=4, max_num_seqs=4, budget=5)
    driver.add([0] * 3, 1, True, 0)
    driver.add([1] * 9, 1, True, 0)
    plans = []
    while driver.scheduler.num_unfinished:
        batch = driver.schedule()
        if batch is not None:
            plans.append((batch.starts, batch.lengths, batch.yields_token))
        driver.collect()
    assert plans == [([0, 0], [3, 2], [True, False]), ([2], [5], [False]), ([7], [2], [True])]
    driver.check_end()


@DEPTHS
def test_last_single_token_of_a_cut_prompt_is_run(depth: int):
    """A prompt one token longer than the budget leaves one token, as a decode row looks."""
    driver = Driver(num_blocks=8, block_size=4, max_num_seqs=4, budget=4)
    driver.add([0, 1, 0, 1, 1], 5, True, 0)
    driver.add([1, 1, 0, 1, 1], 5, True, 0)
    driver.drain(depth)


def test_last_single_token_of_a_cut_prompt_comes_before_later_prompts():
    driver = Driver(num_blocks=40, block_size=4, max_num_seqs=8, budget=4)
    first = driver.add([0, 1, 0, 1, 1], 5, True, 0)
    for _ in range(3):
        driver.add([1, 1, 0, 1], 5, True, 0)
    driver.schedule()
    batch = driver.schedule()
    assert batch.is_prefill and batch.seqs[0] is first
    assert batch.lengths[0] == 1 and batch.yields_token[0]
    driver.drain(1)


@DEPTHS
def test_waiting_prompts_run_before_decode(depth: int):
    driver = Driver(num_blocks=8, block_size=4, max_num_seqs=4, budget=16)
    driver.add([0] * 3, 4, True, 0)
    assert driver.schedule().is_prefill
    driver.add([1] * 3, 4, True, 0)
    if not depth:
        driver.collect()
    batch = driver.schedule()
    assert batch.is_prefill and [seq.seq_id for seq in batch.seqs] == [1]
    driver.drain(depth)


@DEPTHS
def test_no_more_than_max_num_seqs_run_at_once(depth: int):
    driver = Driver(num_blocks=30, block_size=2, max_num_seqs=3, budget=64)
    for i in range(8):
        driver.add([i % 2] * 3, 4, True, i)
    assert len(driver.schedule().seqs) == 3
    driver.drain(depth)


def test_whose_last_token_is_on_the_way_keeps_nobody_waiting():
    driver = Driver(num_blocks=30, block_size=2, max_num_seqs=2, budget=64)
    for i, max_tokens in enumerate([2, 3, 1, 2]):
        driver.add([i] * 3, max_tokens, True, i)
    plans = []
    while driver.schedule() is not None:
        batch, _ = driver.in_flight[-1]
        plans.append((batch.is_prefill, [seq.seq_id for seq in batch.seqs]))
    # Nothing was collected so far.
    assert plans == [
        (True, [0, 1]), (False, [0, 1]), (True, [2]), (False, [1]), (True, [3]), (False, [3])
    ]  # fmt: skip
    while driver.in_flight:
        driver.collect()
    driver.check_end()


def test_places_that_are_free_and_that_get_free_are_taken_together():
    driver = Driver(num_blocks=30, block_size=2, max_num_seqs=4, budget=64)
    for i in range(3):
        driver.add([i] * 3, 2, True, i)
    driver.schedule()
    driver.schedule()
    for i in range(5):
        driver.add([i] * 3, 2, True, i)
    assert len(driver.schedule().seqs) == 4
    driver.drain(depth=2)


@DEPTHS
def test_newest_is_preempted_and_comes_back_first(depth: int):
    driver = Driver(num_blocks=5, block_size=2, max_num_seqs=3, budget=64)
    for i in range(4):
        driver.add([i % 2, i // 2], 6, True, i)
    driver.drain(depth)  # checks the order of each preemption
    assert driver.scheduler.num_preemptions > 0
    assert driver.admitted == [0, 1, 2, 3]


@DEPTHS
def test_preempted_sequence_counts_cached_tokens_of_its_first_admission_only(depth: int):
    driver = Driver(num_blocks=5, block_size=2, max_num_seqs=3, budget=64)
    for i in range(3):
        driver.add([i % 2, i // 2], 6, True, i)
    driver.drain(depth)
    assert driver.scheduler.num_preemptions > 0
    assert [seq.num_cached_tokens for seq in driver.sequences] == [0, 0, 0]


def test_step_in_flight_past_eos_is_discarded():
    driver = Driver(num_blocks=8, block_size=2, max_num_seqs=2, budget=16)
    seed = next(s for s in range(256) if next_token(s, [0, 0]) == EOS)
    seq = driver.add([0, 0], 5, False, seed)
    driver.schedule()
    driver.schedule()  # its input is a token that turns out to be the end
    assert driver.collect() == [seq]
    assert driver.scheduler.num_unfinished == 0 and seq.num_pending_tokens == 1
    assert driver.collect() == []
    assert seq.output_token_ids == [EOS] and seq.finish_reason == "stop"
    driver.check_end()


def test_sequence_at_its_length_is_not_scheduled_while_its_last_token_is_in_flight():
    driver = Driver(num_blocks=8, block_size=2, max_num_seqs=2, budget=16)
    driver.add([0, 0], 1, True, 0)
    driver.schedule()
    assert driver.schedule() is None
    assert len(driver.collect()) == 1
    driver.check_end()


def test_eos_on_the_last_token_is_a_stop():
    driver = Driver(num_blocks=8, block_size=2, max_num_seqs=2, budget=16)
    seed = next(s for s in range(256) if next_token(s, [0, 0]) == EOS)
    driver.add([0, 0], 1, False, seed)
    driver.drain(0)
    assert driver.sequences[0].finish_reason == "stop"


def test_preempted_while_its_last_token_is_in_flight_ends_from_the_queue():
    """`a` takes the last block when `b` has one token to come, and that token still counts."""
    driver = Driver(num_blocks=3, block_size=2, max_num_seqs=2, budget=16)
    a = driver.add([0, 1], 4, True, 0)
    b = driver.add([1, 0, 1], 1, True, 0)
    driver.manager.allocate = _without_headroom(driver.manager.allocate)
    assert driver.schedule().seqs == [a, b]
    assert driver.schedule().seqs == [a]
    assert b.status is SequenceStatus.WAITING and b.num_pending_tokens == 1
    assert driver.collect() == [b]
    driver.drain(1)


def _without_headroom(allocate):
    return lambda seq, headroom, use_cache: allocate(seq, 0, use_cache)


def test_headroom_keeps_a_newcomer_from_being_preempted_at_once():
    driver = Driver(num_blocks=4, block_size=2, max_num_seqs=4, budget=16)
    driver.add([0, 0, 0, 0], 4, True, 0)
    driver.add([1, 1, 1, 1], 4, True, 0)
    assert len(driver.schedule().seqs) == 1
    driver.drain(1)
    assert driver.scheduler.num_preemptions == 0


@DEPTHS
def test_preempted_sequence_finds_its_own_blocks_again(depth: int):
    """It is not computed from the start, and not from blocks that others have taken since."""
    driver = Driver(num_blocks=6, block_size=2, max_num_seqs=2, budget=64)
    old = driver.add([0, 0, 1], 4, True, 0)
    new = driver.add([1, 1, 0, 1, 0], 6, True, 1)
    resumed_at = None
    while driver.scheduler.num_unfinished or driver.in_flight:
        was_waiting = new.status is SequenceStatus.WAITING and driver.scheduler.num_preemptions
        if driver.waits or len(driver.in_flight) > depth or not driver.scheduler.num_unfinished:
            driver.collect()
        else:
            batch = driver.schedule()
            if was_waiting and batch is not None and new in batch.seqs:
                resumed_at = batch.starts[batch.seqs.index(new)]
        driver.check_invariants()
    driver.check_end()
    assert old.is_finished and driver.scheduler.num_preemptions == 1
    assert resumed_at >= 4, "its full blocks were still there"


@DEPTHS
def test_abort_all_empties_everything_in_the_middle(depth: int):
    driver = Driver(num_blocks=5, block_size=2, max_num_seqs=3, budget=3)
    for i in range(5):
        driver.add([0, 1, i % 2, i % 3], 6, True, i)
    for _ in range(4):
        driver.schedule()
        driver.check_invariants()
        if len(driver.in_flight) > depth:
            driver.collect()
    driver.scheduler.abort_all()
    assert driver.manager.num_free_blocks == 5
    assert not driver.manager.block_of_hash
    assert driver.scheduler.num_unfinished == 0
    assert all(seq.is_finished and not seq.block_table for seq in driver.sequences)
    assert_blocks_consistent(driver.manager, [])
