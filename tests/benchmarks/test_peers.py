"""benchmarks/peers.py: other engines, in a process of their own."""

from pathlib import Path

import pytest

from benchmarks import peers

FAKE_ENGINE = """
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, max_model_len):
        self.model = model

    def generate(self, prompts, params):
        assert [len(p) for p in prompts] == [p.max_tokens for p in params], "lengths mixed up"
"""


def test_peers_take_the_engine_of_a_directory(tmp_path: Path) -> None:
    """nano-vllm's package is called nanovllm too: it is that of `engine_path`, not this one."""
    (tmp_path / "nanovllm.py").write_text(FAKE_ENGINE)
    good = {"prompts": [[1], [1, 2]], "output_lens": [1, 2]}
    bad = {"prompts": [[1]], "output_lens": [2]}
    result = peers.time_calls("nano-vllm", tmp_path, [good, good], str(tmp_path))
    assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    with pytest.raises(RuntimeError, match="nano-vllm: AssertionError: lengths mixed up"):
        peers.time_calls("nano-vllm", tmp_path, [bad], str(tmp_path))


def test_peers_say_what_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('no such engine')")
    with pytest.raises(RuntimeError, match="vllm: not installed here: no such engine"):
        peers.time_calls("vllm", tmp_path, [], str(tmp_path))
