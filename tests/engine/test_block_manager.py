"""The block manager against an independent account of what each block holds."""

from array import array
from collections.abc import Callable
from unittest.mock import patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.blocks import MACHINE_SETTINGS, assert_blocks_consistent
from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine.block_manager import BlockManager, hash_block
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams


def new_sequence(token_ids: list[int], max_tokens: int = 1000, n: int = 1) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, n=n)
    return Sequence(0, token_ids, params, len(token_ids) + max_tokens, seed=0)


def compute(manager: BlockManager, seq: Sequence, num_tokens: int) -> None:
    """What a prefill step of `num_tokens` tokens does to a sequence."""
    seq.num_computed_tokens += num_tokens
    manager.register(seq, seq.num_computed_tokens)


def admit(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence whose whole prompt has been computed."""
    seq = new_sequence(token_ids)
    assert manager.allocate(seq)
    compute(manager, seq, len(token_ids) - seq.num_computed_tokens)
    return seq


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences of a two-letter alphabet come, grow and go, so their prefixes collide all the time.

    `contents` says which tokens, the whole prefix included, each block was registered for, from
    what the machine saw handed out; `freed_at` and `worthless` order the free blocks.
    """

    hash_block = staticmethod(hash_block)

    def __init__(self) -> None:
        super().__init__()
        self.patcher = patch.object(block_manager_module, "hash_block", self.hash_block)
        self.patcher.start()
        self.live: list[Sequence] = []
        self.contents: dict[int, tuple[int, ...]] = {}
        self.clock = 0
        self.freed_at: dict[int, int] = {}
        self.worthless: set[int] = set()

    def teardown(self) -> None:
        self.patcher.stop()

    @initialize(num_blocks=st.integers(2, 8), block_size=st.integers(1, 3))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.freed_at = dict.fromkeys(range(num_blocks), 0)
        self.worthless = set(range(num_blocks))

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        headroom=st.sampled_from([0, 0, 0, 1, 3]),
        prefill=st.booleans(),
        n=st.integers(1, 2),
    )
    def allocate(self, token_ids: list[int], headroom: int, prefill: bool, n: int) -> None:
        seq, before = new_sequence(token_ids, n=n), self.snapshot()
        size, free = self.manager.block_size, self.manager.num_free_blocks
        if not self.manager.allocate(seq, headroom):
            assert (seq.block_table, seq.num_computed_tokens) == ([], 0)
            assert self.snapshot() == before, "a refused allocation changed something"
            assert -(-len(token_ids) // size) + headroom > free, "refused, and there was room"
            return
        assert self.manager.num_free_blocks >= headroom
        assert len(seq.block_table) == -(-len(token_ids) // size)
        assert seq.num_found_tokens < len(token_ids) + n - 1, "the last token came from the cache"
        assert seq.num_found_tokens % size == 0
        assert seq.num_computed_tokens == min(seq.num_found_tokens, len(token_ids) - 1)
        num_cached = seq.num_found_tokens // size
        for index, block_id in enumerate(seq.block_table[:num_cached]):
            wanted = tuple(token_ids[: (index + 1) * size])
            assert self.contents.get(block_id) == wanted, "a block of another prefix was shared"
            self.freed_at.pop(block_id, None)
            self.worthless.discard(block_id)
        self.handed_out(seq.block_table[num_cached:])
        self.live.append(seq)
        if prefill:
            compute(self.manager, seq, len(token_ids) - seq.num_computed_tokens)
            self.note_contents(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        missing = len(seq.token_ids) - seq.num_computed_tokens
        if missing:
            compute(self.manager, seq, data.draw(st.integers(1, missing)))
            self.note_contents(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token_id=st.integers(0, 1))
    def decode(self, data: st.DataObject, token_id: int) -> None:
        """A token arrives, and the next step computes it."""
        seq = data.draw(st.sampled_from(self.live))
        if seq.num_computed_tokens < len(seq.token_ids):
            return
        seq.token_ids.append(token_id)
        table, before, free = list(seq.block_table), self.snapshot(), self.manager.num_free_blocks
        if not self.manager.append(seq):
            seq.token_ids.pop()
            assert self.snapshot() == before and seq.block_table == table
            assert free == 0 and len(seq.token_ids) == len(table) * self.manager.block_size
            return
        self.handed_out(seq.block_table[len(table) :])
        assert seq.block_table[: len(table)] == table
        assert len(seq.block_table) == -(-len(seq.token_ids) // self.manager.block_size)
        seq.num_computed_tokens += 1
        if seq.num_computed_tokens % self.manager.block_size == 0:
            self.manager.register(seq, seq.num_computed_tokens)
            self.note_contents(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        table = list(seq.block_table)
        self.manager.free(seq)
        assert (seq.block_table, seq.num_computed_tokens) == ([], 0)
        for block_id in reversed(table):  # the tail of a prefix is the first to be reused
            if not any(block_id in other.block_table for other in self.live):
                self.clock += 1
                self.freed_at[block_id] = self.clock
                if self.findable(block_id):
                    self.worthless.discard(block_id)
                else:
                    self.worthless.add(block_id)

    @rule()
    def reset(self) -> None:
        for seq in self.live:
            seq.block_table.clear()
        self.live.clear()
        self.contents.clear()
        self.manager.reset()
        self.freed_at = dict.fromkeys(range(len(self.manager.blocks)), 0)
        self.worthless = set(self.freed_at)
        assert not self.manager.block_of_hash

    @invariant()
    def blocks_are_consistent(self) -> None:
        assert_blocks_consistent(self.manager, self.live)
        assert set(self.freed_at) == set(self.manager.free_blocks)

    @invariant()
    def hashes_lead_to_exactly_their_tokens(self) -> None:
        size = self.manager.block_size
        for key, block in self.manager.block_of_hash.items():
            content = self.contents[block.block_id]
            assert tuple(block.token_ids) == content[-size:]
            expected = 0
            for start in range(0, len(content), size):
                tokens = array("I", content[start : start + size])
                expected = block_manager_module.hash_block(expected, tokens)
            assert key == expected
        for block_id, content in self.contents.items():
            same_id = [
                self.contents[other.block_id]
                for other in self.manager.blocks
                if other.content_id == self.manager.blocks[block_id].content_id
                and other.block_id in self.contents
            ]
            assert set(same_id) == {content}, "one content id for two contents"

    def findable(self, block_id: int) -> bool:
        return any(block.block_id == block_id for block in self.manager.block_of_hash.values())

    def handed_out(self, new: list[int]) -> None:
        """Blocks given to a sequence: were these the ones to be reused first?"""
        for block_id in new:
            if self.worthless:
                assert block_id in self.worthless, "a useful block went before a worthless one"
            else:
                oldest = min(self.freed_at, key=self.freed_at.__getitem__)
                assert block_id == oldest, "not the least recently used block"
            del self.freed_at[block_id]
            self.worthless.discard(block_id)
            self.contents.pop(block_id, None)

    def note_contents(self, seq: Sequence) -> None:
        size = self.manager.block_size
        for index, block_id in enumerate(seq.block_table[: seq.num_computed_tokens // size]):
            content = tuple(seq.token_ids[: (index + 1) * size])
            assert self.contents.setdefault(block_id, content) == content

    def snapshot(self) -> object:
        return (
            [(b.ref_count, b.hash, b.content_id, list(b.token_ids)) for b in self.manager.blocks],
            list(self.manager.free_blocks),
            {key: block.block_id for key, block in self.manager.block_of_hash.items()},
        )


class CollidingMachine(BlockManagerMachine):
    """The same with three hash values in all."""

    @staticmethod
    def hash_block(prefix_hash: int, token_ids: array) -> int:
        return hash_block(prefix_hash, token_ids) % 3


class PrefixBlindMachine(BlockManagerMachine):
    """The same with a hash of a block's own tokens: other prefixes collide, other tokens do not."""

    @staticmethod
    def hash_block(prefix_hash: int, token_ids: array) -> int:
        return hash_block(0, token_ids)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = MACHINE_SETTINGS
TestCollidingHashes = CollidingMachine.TestCase
TestCollidingHashes.settings = MACHINE_SETTINGS
TestPrefixBlindHashes = PrefixBlindMachine.TestCase
TestPrefixBlindHashes.settings = MACHINE_SETTINGS


HASHES = {
    "one for all": lambda prefix_hash, tokens: 0,
    "blind to the prefix": lambda prefix_hash, tokens: tokens[0],
}


@pytest.mark.parametrize("colliding", HASHES.values(), ids=HASHES.keys())
def test_equal_hashes_of_other_contents_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, colliding: Callable[[int, array], int]
):
    monkeypatch.setattr(block_manager_module, "hash_block", colliding)
    manager = BlockManager(num_blocks=16, block_size=2)
    admit(manager, [1, 1, 2, 2, 9])
    for token_ids in ([3, 3, 9], [2, 2, 9], [1, 2, 9], [3, 3, 2, 2, 9]):
        other = new_sequence(token_ids)
        assert manager.allocate(other)
        assert other.num_computed_tokens == 0, token_ids


def test_same_prompt_is_found_again_except_for_its_last_token():
    manager = BlockManager(num_blocks=8, block_size=2)
    for length, expected in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 4)):
        seq = admit(manager, list(range(10, 10 + length)))
        manager.free(seq)
        again = new_sequence(list(range(10, 10 + length)))
        assert manager.allocate(again)
        assert again.num_computed_tokens == expected
        manager.free(again)


def test_same_tokens_after_another_prefix_are_not_shared():
    manager = BlockManager(num_blocks=8, block_size=2)
    admit(manager, [1, 1, 5, 5, 9])
    other = new_sequence([2, 2, 5, 5, 9])
    assert manager.allocate(other)
    assert other.num_computed_tokens == 0


def test_prefix_outlives_its_continuation():
    """With two blocks to spare, a third is taken from the end of the cached prompt."""
    manager = BlockManager(num_blocks=5, block_size=2)
    manager.free(admit(manager, [1, 1, 2, 2, 3, 3, 4]))  # three full blocks, one part
    admit(manager, [9, 9, 9, 9, 9])  # takes three: the unused, the part, the tail
    again = new_sequence([1, 1, 2])
    assert manager.allocate(again)
    assert again.num_computed_tokens == 2


def test_forgotten_block_is_not_found():
    manager = BlockManager(num_blocks=2, block_size=2)
    manager.free(admit(manager, [1, 1, 2]))
    manager.free(admit(manager, [3, 3, 4, 4]))
    again = new_sequence([1, 1, 2])
    assert manager.allocate(again)
    assert again.num_computed_tokens == 0


def test_second_copy_of_a_block_is_freed_before_the_first():
    """Two sequences may compute the same block each on its own; only one copy is worth keeping."""
    manager = BlockManager(num_blocks=4, block_size=2)
    first, second = new_sequence([1, 1, 2]), new_sequence([1, 1, 2])
    assert manager.allocate(first) and manager.allocate(second)
    compute(manager, first, 3)
    compute(manager, second, 3)
    kept, copy = first.block_table[0], second.block_table[0]
    manager.free(first)
    manager.free(second)
    order = list(manager.free_blocks)
    assert order.index(copy) < order.index(kept)
    third = new_sequence([1, 1, 2])
    assert manager.allocate(third)
    assert third.block_table[0] == kept


def test_continuation_of_a_second_copy_is_found_after_the_first():
    """The copies' contents are one and the same, so what follows one of them follows both."""
    manager = BlockManager(num_blocks=8, block_size=2)
    first, second = new_sequence([1, 1, 2]), new_sequence([1, 1, 3, 3, 4])
    assert manager.allocate(first) and manager.allocate(second)
    compute(manager, first, 3)
    compute(manager, second, 5)
    third = new_sequence([1, 1, 3, 3, 5])
    assert manager.allocate(third)
    assert third.block_table[:2] == [first.block_table[0], second.block_table[1]]


def test_headroom_counts_free_blocks_after_the_shared_ones():
    manager = BlockManager(num_blocks=4, block_size=2)
    first = admit(manager, [1, 1, 2, 2, 3])  # 3 blocks; 1 free
    second = new_sequence([1, 1, 2, 2, 3])  # shares 2, needs 1
    assert not manager.allocate(second, headroom=1)
    assert manager.allocate(second, headroom=0)
    assert second.block_table[:2] == first.block_table[:2]


@pytest.mark.parametrize("bits", [0, 1, 63, 64])
def test_hash_takes_any_chained_hash(bits: int):
    """A hash has 64 bits, and is the seed of the next."""
    assert 0 <= hash_block((1 << bits) - 1, array("I", [0, 2**31, 151_935])) < 2**64
