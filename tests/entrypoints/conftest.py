"""Shared by the tests of what is built on the library."""

import pytest
from helpers.command_line import RecordingLLM

from nanovllm.entrypoints import common


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[RecordingLLM]:
    """The engines that a command has built so far."""
    monkeypatch.setattr(RecordingLLM, "engines", [])
    monkeypatch.setattr(common, "LLM", RecordingLLM)
    return RecordingLLM.engines
