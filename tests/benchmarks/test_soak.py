"""benchmarks/soak.py: it holds, and notices what does not."""

import pytest

from benchmarks import soak
from nanovllm import LLM


def test_soak_holds(capsys: pytest.CaptureFixture[str]) -> None:
    soak.main(["--requests", "120", "--sample", "10"])
    out = capsys.readouterr().out
    assert "all held" in out and "requests compared with a run alone" in out


def test_soak_finds_a_leak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(self: LLM, request_id: int) -> None:
        queue = self.scheduler.running
        queue[:] = [seq for seq in queue if seq.seq_id != request_id]

    monkeypatch.setattr(soak.LLM, "abort", forget)
    with pytest.raises(SystemExit) as stopped:
        soak.main(["--requests", "60", "--sample", "2", "--abort-rate", "0.5"])
    assert "failures" in str(stopped.value.code)
    assert "FAILED: " in capsys.readouterr().out
