"""How long running sequences wait while prompts come in: `Driver` checks each of their waits."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from helpers.scheduling import Driver
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.scheduler import MAX_PREFILL_STEPS
from nanovllm.engine.sequence import Sequence

DEPTHS = pytest.mark.parametrize("depth", [0, 1], ids=["sync", "async"])
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 2]),  # steps after the one before
        st.integers(1, 30),  # tokens of the prompt
        st.integers(2, 12),  # at most generated
        st.booleans(),  # may end before, by EOS
    ),
    min_size=5,
    max_size=24,
)


def distinct_prompt(index: int, length: int) -> list[int]:
    """From the fifth token on unlike those of other indices up to 31."""
    return [index >> bit % 5 & 1 for bit in range(length)]


def step(driver: Driver, depth: int) -> None:
    """As the engine's: plan and launch, then collect what may not stay in flight."""
    batch = driver.schedule() if driver.scheduler.num_unfinished else None
    while len(driver.in_flight) > (depth if batch is not None else 0):
        driver.collect()
    driver.check_invariants()


def steps_until_the_end(driver: Driver, seq: Sequence, arrivals: list[int], depth: int) -> int:
    """Of a sequence, while a prompt of so many tokens comes at each step."""
    left = list(arrivals)
    number = 0
    while not seq.is_finished:
        step(driver, depth)
        number += 1
        if left:
            driver.add([number % 2] * left.pop(), 1, True, 0)
    driver.drain(depth)
    return number


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    arrivals=ARRIVALS,
    num_blocks=st.one_of(st.integers(2, 20), st.integers(20, 200)),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(2, 24),
    budget=st.integers(1, 20),
    limit=st.sampled_from([1, 2, 3, MAX_PREFILL_STEPS]),
    depth=st.integers(0, 1),
)
def test_no_running_sequence_waits_for_more_steps_than_promised(
    arrivals: list, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, limit: int,
    depth: int,
):  # fmt: skip
    driver = Driver(num_blocks, block_size, max_num_seqs, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "MAX_PREFILL_STEPS", limit)
        for index, (delay, length, max_tokens, may_end) in enumerate(arrivals):
            for _ in range(delay):
                step(driver, depth)
            driver.add(distinct_prompt(index, length), max_tokens, not may_end, index % 5)
        driver.drain(depth)  # all end, with the tokens they have alone
    event(f"longest wait is the limit of {limit}: {driver.longest_wait == limit}")
    event(f"preemptions: {min(driver.scheduler.num_preemptions, 3)}")


@DEPTHS
def test_full_steps_that_bring_rows_run_up_to_the_limit_in_a_row(depth: int):
    """All prompts come at once. Nothing waits during the first step."""
    driver = Driver(num_blocks=200, block_size=8, max_num_seqs=50, budget=8)
    for index in range(25):
        driver.add(distinct_prompt(index, 8), 4, True, index)
    kinds = []
    while driver.scheduler.num_unfinished:
        kinds.append("P" if driver.schedule().is_prefill else "D")
        if len(driver.in_flight) > depth:
            driver.collect()
        if kinds.count("P") == 25:
            break
    assert MAX_PREFILL_STEPS == 8
    assert "".join(kinds) == "P" + "D".join(["PPPPPPPP"] * 3)
    driver.drain(depth)


@DEPTHS
def test_of_prompts_that_come_one_a_step_each_waits_for_one_decode_step_at_most(depth: int):
    driver = Driver(num_blocks=200, block_size=4, max_num_seqs=90, budget=64)
    seq = driver.add([0, 1], 10, True, 0)
    assert steps_until_the_end(driver, seq, [3] * 60, depth) <= 2 * 10 + depth


@DEPTHS
def test_a_long_prompt_in_chunks_leaves_every_second_step_to_decode(depth: int):
    driver = Driver(num_blocks=200, block_size=4, max_num_seqs=4, budget=4)
    seq = driver.add([0, 1], 10, True, 0)
    assert steps_until_the_end(driver, seq, [200], depth) <= 2 * 10 + depth


@DEPTHS
def test_a_prompt_half_run_gives_its_blocks_to_an_older_sequence(depth: int):
    """Both end: what is preempted comes back when the older one has ended, or has room."""
    driver = Driver(num_blocks=10, block_size=2, max_num_seqs=2, budget=1)
    old = driver.add([0, 1], 12, True, 0)
    while not driver.device.num_sampled.get(old.seq_id):
        step(driver, depth)
    new = driver.add([1] * 14, 2, True, 1)
    while not driver.scheduler.num_preemptions:
        step(driver, depth)
    assert not new.block_table and new.num_generated == 0 and not old.is_finished
    driver.drain(depth)
