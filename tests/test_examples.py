"""What a newcomer runs first: example.py, and the README's code."""

import re

import pytest
import torch

from helpers.paths import DEMO, ROOT
from helpers.scripts import run_script


def test_example_talks() -> None:
    out = run_script("example.py")
    assert out.splitlines()[0].startswith("This is the tiny demo model")
    assert "--model" in out.splitlines()[0]
    assert "I am a tiny demo model of nanovllm" in out
    assert "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53" in out
    assert "47 + 38 = 85" in out
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in out


def test_example_takes_prompts() -> None:
    out = run_script("example.py", "--model", str(DEMO), "--prompt", "20+22=", "--temperature", "0")
    assert "tiny demo model" not in out
    assert "20 + 22 = 42" in out


def test_example_streams() -> None:
    out = run_script("example.py", "--stream", "--prompt", "20+22=")
    assert "> 20+22=\n20 + 22 = 42\n" in out


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_readme_code_runs(
    code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lm_eval" in code:
        pytest.skip("takes 20 s; entrypoints/test_lm_eval_harness.py makes the same call")
    if "tensor_parallel_size=2" in code and torch.cuda.device_count() == 1:
        pytest.skip("needs two CUDA GPUs, or none")
    monkeypatch.chdir(ROOT)
    if "import ray" in code:
        pytest.skip("takes half a minute; entrypoints/test_ray_data.py makes the same call")
    exec(code.replace("Qwen/Qwen3-0.6B", str(DEMO)), {})
    assert capsys.readouterr().out.strip()


def test_readme_lists_every_option() -> None:
    from dataclasses import fields

    from nanovllm import SamplingParams
    from nanovllm.config import Config

    for field in fields(Config):
        if field.init and field.name != "model":
            assert re.search(rf"^\|.*`{field.name}`.*\|", README, re.MULTILINE), field.name
    for field in fields(SamplingParams):
        assert f"`{field.name}`" in README, field.name
