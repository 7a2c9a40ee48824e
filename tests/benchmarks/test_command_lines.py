"""The command lines of benchmarks/: what makes no sense is refused before anything runs."""

from pathlib import Path

import pytest
import torch

from benchmarks import cpu, gpu, plot, profile, soak


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (gpu.main, ["--tiny", "--only", "mixx"], "invalid choice: 'mixx'"),
        (gpu.main, ["--tiny", "--runs", "0"], "--runs must be at least 1"),
        (gpu.main, ["--tiny", "--engine", "nano-vllm"], "needs --engine-path"),
        (profile.main, ["--tiny", "--steps", "0"], "--steps must be at least 1"),
        (soak.main, ["--requests", "0"], "must be at least 1"),
        (plot.main, [str(Path(__file__).parent / "nowhere.json")], "nowhere.json"),
    ],
)
def test_wrong_options_are_refused(
    main, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_engine_is_named_with_its_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["cpu.py", "--engine", "llama.cpp"])
    with pytest.raises(SystemExit):
        cpu.main()
    assert "pip install llama-cpp-python gguf" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("main", [gpu.main, profile.main])
def test_full_size_needs_a_gpu(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--tiny" in capsys.readouterr().err
