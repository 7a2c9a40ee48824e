"""Checks of user input that more than one class makes."""

import operator
from typing import Any

import numpy as np


def as_integer(name: str, value: Any) -> int:
    """`value` as an int; refuses bools, floats and strings, takes NumPy integers."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def as_number(name: str, value: Any) -> float:
    """`value` as a float; refuses bools and strings, takes NumPy numbers."""
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is too large: {value!r}") from None
