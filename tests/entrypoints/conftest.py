"""Engines for the tests of what is built on the library."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from helpers.command_line import DEMO, RecordingLLM
from nanovllm import LLM
from nanovllm.entrypoints import common

if TYPE_CHECKING:
    from nanovllm.lm_eval import NanoVLLM

if find_spec("lm_eval") is None:
    collect_ignore_glob = ["test_lm_eval_*.py"]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[RecordingLLM]:
    """The engines that a command has built so far."""
    monkeypatch.setattr(RecordingLLM, "engines", [])
    monkeypatch.setattr(common, "LLM", RecordingLLM)
    return RecordingLLM.engines


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The engine that the lm_eval model runs on."""
    with LLM(DEMO, dtype="float32", device="cpu", num_kvcache_blocks=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours(llm: LLM) -> "NanoVLLM":
    """The lm_eval model."""
    from nanovllm.lm_eval import NanoVLLM

    return NanoVLLM(llm)
