"""What the tests of sampling share."""

import pytest

from helpers.engines import assert_empty
from nanovllm import LLM


@pytest.fixture
def llm(small_engine: LLM):
    """An engine for all tests, which must leave it empty."""
    yield small_engine
    assert_empty(small_engine)
