"""The work list of prefill attention: every query once, tiles of many keys first."""

import numpy as np
import pytest
import torch

from nanovllm.kernels.prefill_plan import (
    SHORT_TILE,
    TILE,
    WORDS,
    PrefillPlan,
    max_prefill_words,
)

LEFT = 10**6  # what a larger step has left in the buffer


def some_lengths(seed: int, longest: int) -> np.ndarray:
    """Of up to 40 rows, among them those about the sizes of tiles."""
    random = np.random.default_rng(seed)
    edges = [1, SHORT_TILE - 1, SHORT_TILE, SHORT_TILE + 1, TILE - 1, TILE, TILE + 1, 4 * TILE]
    lengths = random.choice([*edges, *random.integers(1, 1000, 8)], random.integers(40))
    return random.permutation([*np.minimum(lengths, longest), longest]).astype(np.int32)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("longest", "tile"), [(1, 16), (16, 16), (17, 64), (64, 64), (1000, 64)])
def test_plan_holds_every_query_once(longest: int, tile: int, seed: int) -> None:
    lengths = some_lengths(seed, longest)
    random = np.random.default_rng(seed)
    starts = random.choice([0, 1, 63, 64, 5000], len(lengths)).astype(np.int32)
    rows, tokens, contexts = len(lengths), int(lengths.sum()), starts + lengths
    sizes = rows, tokens, longest, int(contexts.max())
    buffer = np.full(max_prefill_words(rows, tokens), LEFT, np.int32)
    plan = PrefillPlan.views(buffer, *sizes)
    plan.fill(starts, lengths)
    assert plan[1:] == (tile, longest, contexts.max())

    counts = plan.tiles[:, 1]
    used = np.count_nonzero(counts)
    assert (counts[:used] > 0).all() and not plan.tiles[used:].any()  # the others are the last
    assert used == (-(-lengths // tile)).sum()
    keys_seen = plan.tiles[:used, 2] + counts[:used]
    assert (np.diff(keys_seen) <= 0).all()

    found = {}  # of each query: its row, position and the row's context
    for first, count, position, row, context in plan.tiles[:used].tolist():
        assert count <= tile
        for i in range(count):
            assert first + i not in found
            found[first + i] = row, position + i, context
    places = [(row, start + i) for row, start in enumerate(starts) for i in range(lengths[row])]
    expected = [(row, position, contexts[row]) for row, position in places]
    assert [found[query] for query in range(tokens)] == expected

    views = PrefillPlan.views(torch.from_numpy(buffer), *sizes)
    assert views[1:] == plan[1:] and views.tiles.tolist() == plan.tiles.tolist()
    assert (buffer[plan.tiles.size :] == LEFT).all()  # what is another's, if any


@pytest.mark.parametrize(
    ("most_rows", "most_tokens"),
    [(1, 1), (1, 4096), (7, 64), (16, 300), (512, 512), (512, 16384), (5, 16384)],
)
def test_a_buffer_for_the_largest_step_holds_any(most_rows: int, most_tokens: int) -> None:
    """Views of a plan that is longer than the buffer would be an error."""
    buffer = np.full(max_prefill_words(most_rows, most_tokens), LEFT, np.int32)
    for rows in sorted({1, 2, most_rows // 2 + 1, most_rows}):
        for tokens in {rows, 16 * rows, 17 * rows, 63 * rows, most_tokens - 1, most_tokens}:
            if not (rows <= most_rows and rows <= tokens <= most_tokens):
                continue
            even = np.full(rows, tokens // rows)
            even[: tokens % rows] += 1
            uneven = np.full(rows, 1)
            uneven[-1] = tokens - rows + 1
            for lengths in (even, uneven):
                plan = PrefillPlan.views(buffer, rows, tokens, lengths.max(), 10**5)
                plan.fill(0 * lengths, lengths)
                assert plan.tiles.shape[1] == WORDS and plan.tiles[:, 1].sum() == tokens
