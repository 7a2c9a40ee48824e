"""The garbage collector, while many objects are made."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.engines import GREEDY, build
from nanovllm import llm as llm_module
from nanovllm.utils.collector import COLLECT_EVERY, older_objects_spared


class Cycle:
    def __init__(self) -> None:
        self.own = self


def is_collected(cycle: "weakref.ref[Cycle]") -> bool:
    gc.collect()
    return cycle() is None


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    """As all tests' imports are: see conftest.py."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()


def test_older_objects_are_left_alone_until_the_last_block_ends():
    old = Cycle()
    old_cycle = weakref.ref(old)
    with older_objects_spared():
        del old
        with older_objects_spared():
            new_cycle = weakref.ref(Cycle())
            assert is_collected(new_cycle) and not is_collected(old_cycle)
        assert not is_collected(old_cycle)
    assert is_collected(old_cycle)


def test_a_program_that_does_nothing_else_keeps_no_garbage():
    cycles, old = [], Cycle()
    for index in range(2 * COLLECT_EVERY):
        with older_objects_spared():
            made = [[number] for number in range(2000)]
        del made
        if index == COLLECT_EVERY // 2:
            cycles.append(weakref.ref(old))
            del old
        cycles.append(weakref.ref(Cycle()))
    assert sum(cycle() is not None for cycle in cycles) <= 1


def test_what_the_program_has_frozen_stays_frozen():
    frozen = weakref.ref(Cycle())
    gc.freeze()
    with older_objects_spared():
        assert not is_collected(frozen)
    assert not is_collected(frozen)


def test_an_error_ends_it():
    with pytest.raises(KeyError), older_objects_spared():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_an_interrupt_while_it_begins_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    freeze = gc.freeze

    def interrupted() -> None:
        freeze()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc, "freeze", interrupted)
        with pytest.raises(KeyboardInterrupt), older_objects_spared():
            pass
    assert gc.get_freeze_count() == 0
    with older_objects_spared():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("number, spares", [(2, True), (1, False)])
def test_generate_spares_older_objects_if_it_has_many_requests(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, number: int, spares: bool
):
    monkeypatch.setattr(llm_module, "MANY_REQUESTS", 2)
    counts = []
    with build(tiny) as llm:
        step = llm.step
        monkeypatch.setattr(llm, "step", lambda: (counts.append(gc.get_freeze_count()), step()))
        llm.generate([[5, 6]] * number, GREEDY, use_tqdm=False)
    assert all((count > 0) is spares for count in counts) and counts
    assert gc.get_freeze_count() == 0
