"""Which combinations of parameters always run, and which only by `-m slow`."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest


def slow(value: object) -> Any:
    """A value of a parameter that takes its turn only by `-m slow`."""
    return pytest.param(value, marks=pytest.mark.slow)


def in_turns(names: str, *axes: Mapping[str, Any], share: int, **options: Any) -> Any:
    """Parametrize by all combinations of the axes' values, given by their ids.

    One combination in `share` always runs, so that every value takes its turn, and meets those of
    the other axes in turn; the others are slow.
    """
    cases = []
    for places in product(*(range(len(axis)) for axis in axes)):
        chosen = [list(axis.items())[place] for axis, place in zip(axes, places, strict=True)]
        cases.append(
            pytest.param(
                *(value for _, value in chosen),
                id="-".join(key for key, _ in chosen),
                marks=pytest.mark.slow if sum(places) % share else (),
            )
        )
    return pytest.mark.parametrize(names, cases, **options)
