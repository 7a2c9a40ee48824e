"""Numbers that people give: taken as they mean them, or refused by name."""

import math
from fractions import Fraction

import numpy as np
import pytest

from nanovllm.utils.validation import as_integer, as_number


@pytest.mark.parametrize("value", [0, -3, 2**70, np.int64(5), np.uint8(7)])
def test_an_integer_is_taken_as_pythons(value: object):
    found = as_integer("size", value)
    assert found == value and type(found) is int


@pytest.mark.parametrize("value", [True, False, np.bool_(True), 1.0, np.float32(1), "1", None, [1]])
def test_what_is_no_integer_is_refused_by_name(value: object):
    with pytest.raises(TypeError, match=r"^size must be an integer, got"):
        as_integer("size", value)


@pytest.mark.parametrize("value", [0, -1.5, np.float32(0.5), np.int8(3), Fraction(1, 4), math.inf])
def test_a_number_is_taken_as_a_float(value: object):
    found = as_number("share", value)
    assert found == value and type(found) is float


@pytest.mark.parametrize("value", [True, np.bool_(False), "1", b"1", None, 1j, [1.0], np.ones(2)])
def test_what_is_no_number_is_refused_by_name(value: object):
    with pytest.raises(TypeError, match=r"^share must be a number, got"):
        as_number("share", value)


def test_a_number_beyond_floats_is_refused_by_name():
    with pytest.raises(ValueError, match="share is too large"):
        as_number("share", 10**400)
