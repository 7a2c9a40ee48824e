"""What the commands of `python -m nanovllm` share: options, errors, help."""

from pathlib import Path

import pytest

from helpers.command_line import DEMO
from nanovllm.entrypoints.command_line import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be a finite number, 0 (greedy) or above"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--top-k", "x"], "--top-k: invalid int value"),
    ],
)
def test_bad_sampling_option(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["chat", "no/such/model", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("./nowhere", [], "model directory './nowhere' does not exist"),
        (DEMO, ["--dtype", "int8"], "dtype must be one of"),
        (DEMO, ["--max-model-len", "1"], "max_model_len must be at least 2"),
        (DEMO, ["--device", "abacus"], "device must be"),
    ],
)
def test_engine_that_cannot_be_built(
    model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["chat", model, *options]) == 2
    assert message in capsys.readouterr().err


def test_invalid_generation_config(tiny_copy: Path, capsys: pytest.CaptureFixture[str]):
    (tiny_copy / "generation_config.json").write_text('{"top_p": 2}')
    assert main(["chat", str(tiny_copy), "--device", "cpu"]) == 2
    assert "cannot be used: top_p must be" in capsys.readouterr().err


def test_chat_needs_a_template(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["chat", str(tiny), "--device", "cpu"]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"python -m nanovllm {name} Qwen/Qwen3-0.6B" in capsys.readouterr().out
