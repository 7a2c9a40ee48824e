"""Which KV block holds what: allocate, share by prefix hash, append, free.

The KV cache is a pool of blocks of `block_size` tokens each. A full block is registered under the
hash of its tokens chained with the hash of the blocks before it, so that a later sequence with the
same prefix points at the same block instead of computing it again (the "automatic prefix caching"
of vLLM, over the paged memory of Kwon et al. 2023, arXiv:2309.06180). A freed block keeps its
contents, and can be found again, until it is needed for something else: least recently freed
first.
"""

from array import array
from collections import OrderedDict
from itertools import count

import xxhash

from nanovllm.engine.sequence import Sequence

EMPTY_PREFIX = 0  # the hash and the content id of no tokens; blocks that hold none have them, too
_NO_TOKENS = array("I")


class Block:
    """One block of the pool.

    `content_id` names what a registered block holds, its whole prefix included, and is never used
    twice. A block matches a prompt only if its tokens are equal and its `parent_id` is the content
    id of the block matched before it, so that neither a hash collision nor a reused block can pass
    for something else.
    """

    __slots__ = ("block_id", "content_id", "hash", "parent_id", "ref_count", "token_ids")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.forget()

    @property
    def is_registered(self) -> bool:
        return self.content_id != EMPTY_PREFIX

    def forget(self) -> None:
        self.hash = self.content_id = self.parent_id = EMPTY_PREFIX
        self.token_ids = _NO_TOKENS


def hash_block(prefix_hash: int, token_ids: array) -> int:
    """xxh64 of a block's tokens, chained with the hash of everything before it."""
    return xxhash.xxh64_intdigest(token_ids, seed=prefix_hash)


class BlockManager:
    """Hands out the blocks of a KV cache of `num_blocks` blocks of `block_size` tokens.

    With `shares_prefixes` off, no sequence finds the blocks of another.

    Attributes:
        fewest_free: the least number of free blocks that there ever was.
    """

    def __init__(self, num_blocks: int, block_size: int, shares_prefixes: bool = True) -> None:
        self.block_size = block_size
        self.shares_prefixes = shares_prefixes
        self.fewest_free = num_blocks
        self._content_ids = count(EMPTY_PREFIX + 1)
        self._clear(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    def allocate(self, seq: Sequence, headroom: int = 0, use_cache: bool = True) -> bool:
        """Give a sequence blocks for all its tokens, with `use_cache` sharing those of a cached
        prefix.

        Leaves `headroom` blocks free for others. Sets the sequence's block table, and
        `num_found_tokens` and `num_computed_tokens` to the cached prefix. The last token is always
        run, since that is what yields the next one. Its block is a new one, as its key and value
        are stored there. But if a prompt ends where a block ends, its completions share that block
        too, and store nothing in it. Returns False, and changes nothing, if there are not enough
        free blocks.
        """
        assert not seq.block_table and not seq.num_pending_tokens
        if headroom >= self.num_free_blocks:  # at least one block is a new one: spare the hashing
            return False
        cached = self._cached_prefix(seq) if use_cache and self.shares_prefixes else []
        num_blocks = -(-len(seq.token_ids) // self.block_size)
        # A cached block that nobody holds leaves the free blocks, too.
        num_taken = num_blocks - sum(block.ref_count > 0 for block in cached)
        if num_taken + headroom > self.num_free_blocks:
            return False
        for block in cached:
            if block.ref_count == 0:
                del self.free_blocks[block.block_id]
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        for _ in range(num_blocks - len(cached)):
            self._append_new_block(seq)
        seq.num_found_tokens = len(cached) * self.block_size
        seq.num_computed_tokens = min(seq.num_found_tokens, len(seq.token_ids) - 1)
        return True

    def append(self, seq: Sequence) -> bool:
        """Make room for the keys and values of the sequence's next token to run, by a block if it
        takes one.

        Returns False, and changes nothing, if that takes a block and none is free.
        """
        if seq.num_computed_tokens < len(seq.block_table) * self.block_size:
            return True
        if not self.free_blocks:
            return False
        self._append_new_block(seq)
        return True

    def register(self, seq: Sequence, num_tokens: int) -> None:
        """Let others find the sequence's full blocks among its first `num_tokens` tokens.

        A prompt's are registered as soon as the step that fills them is planned. That is safe:
        whoever reads a block is launched in that step or later, and in a step every layer writes
        all keys and values before it reads any (`AttentionBackend.attend`). Blocks of generated
        tokens are registered when their tokens are known.
        """
        if not self.shares_prefixes:
            return
        blocks = [self.blocks[i] for i in seq.block_table[: num_tokens // self.block_size]]
        first_new = len(blocks)  # those before it are registered already
        while first_new > 0 and not blocks[first_new - 1].is_registered:
            first_new -= 1
        for index in range(first_new, len(blocks)):
            block = blocks[index]
            prefix_hash = blocks[index - 1].hash if index else EMPTY_PREFIX
            parent_id = blocks[index - 1].content_id if index else EMPTY_PREFIX
            tokens = seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
            block.hash = hash_block(prefix_hash, tokens)
            block.token_ids, block.parent_id = tokens, parent_id
            known = self.block_of_hash.get(block.hash)
            if known and known.parent_id == parent_id and known.token_ids == tokens:
                block.content_id = known.content_id  # a second copy: the first stays the known one
            else:
                block.content_id = next(self._content_ids)
                self.block_of_hash[block.hash] = block

    def free(self, seq: Sequence) -> None:
        """Take a sequence's blocks back. Their contents stay findable until they are reused."""
        # The last block first, since the first freed is the first reused: a prefix stays longer.
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_blocks[block_id] = block
                if not self._is_findable(block):
                    self.free_blocks.move_to_end(block_id, last=False)  # nothing worth keeping
        seq.block_table.clear()
        seq.num_computed_tokens = seq.num_found_tokens = 0

    def reset(self) -> None:
        """Free all blocks and forget what they hold: after a failed step nobody knows."""
        self._clear(len(self.blocks))

    def _clear(self, num_blocks: int) -> None:
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.block_of_hash: dict[int, Block] = {}
        # Free blocks, the next one to be given out first.
        self.free_blocks: OrderedDict[int, Block] = OrderedDict(enumerate(self.blocks))

    def _cached_prefix(self, seq: Sequence) -> list[Block]:
        """The longest run of known full blocks that a sequence starts with, its last token apart if
        it is the only completion of its prompt."""
        token_ids, found = seq.token_ids, list[Block]()
        num_tokens = len(token_ids) - (0 if seq.has_siblings else 1)
        prefix_hash, parent_id = EMPTY_PREFIX, EMPTY_PREFIX
        for start in range(0, num_tokens - self.block_size + 1, self.block_size):
            tokens = token_ids[start : start + self.block_size]
            prefix_hash = hash_block(prefix_hash, tokens)
            block = self.block_of_hash.get(prefix_hash)
            if block is None or block.parent_id != parent_id or block.token_ids != tokens:
                break
            found.append(block)
            parent_id = block.content_id
        return found

    def _is_findable(self, block: Block) -> bool:
        return self.block_of_hash.get(block.hash) is block

    def _append_new_block(self, seq: Sequence) -> None:
        block_id, block = self.free_blocks.popitem(last=False)
        if self._is_findable(block):
            del self.block_of_hash[block.hash]
        block.forget()
        block.ref_count = 1
        seq.block_table.append(block_id)
        self.fewest_free = min(self.fewest_free, self.num_free_blocks)
