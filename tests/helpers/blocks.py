"""What must hold of a pool of KV blocks, and how long to look for a way to break it."""

from hypothesis import settings

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

MACHINE_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
)


def assert_blocks_consistent(manager: BlockManager, live: list[Sequence]) -> None:
    """What must hold of the pool after every action, `live` being all sequences with a table."""
    holders = [0] * len(manager.blocks)
    for seq in live:
        assert len(set(seq.block_table)) == len(seq.block_table), "a table holds a block twice"
        for block_id in seq.block_table:
            holders[block_id] += 1
    assert [block.ref_count for block in manager.blocks] == holders, "ref count != tables"
    used = {block_id for block_id, count in enumerate(holders) if count}
    assert used.isdisjoint(manager.free_blocks), "a block is both free and used"
    assert used | set(manager.free_blocks) == set(range(len(manager.blocks))), "a block is lost"
    for block_id, block in manager.free_blocks.items():
        assert block is manager.blocks[block_id]
    for key, block in manager.block_of_hash.items():
        assert block.hash == key, "a stale hash points at a reused block"
        assert len(block.token_ids) == manager.block_size
    for seq in live:
        num_stored = max(seq.num_computed_tokens, seq.num_found_tokens)
        first_open = num_stored // manager.block_size
        for block_id in seq.block_table[first_open:]:
            assert holders[block_id] == 1, "a block that can still be written to is shared"
