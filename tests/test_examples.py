"""The programs that a newcomer runs first: example.py, bench.py, and the README's code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import DEMO, ROOT


def run(*command: str) -> str:
    """What a script at the top of the repository prints."""
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_example_talks() -> None:
    out = run("example.py")
    assert out.splitlines()[0].startswith("This is the tiny demo model")
    assert "--model" in out.splitlines()[0]
    assert "I am a tiny demo model of nanovllm" in out
    assert "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53" in out
    assert "47 + 38 = 85" in out
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in out


def test_example_takes_prompts() -> None:
    out = run("example.py", "--model", str(DEMO), "--prompt", "20+22=", "--temperature", "0")
    assert "tiny demo model" not in out
    assert "20 + 22 = 42" in out


def test_bench_reports_rates_and_floor(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    out = run(
        "bench.py", "--model", str(DEMO), "--num-requests", "4", "--input-len", "20", "40",
        "--output-len", "5", "9", "--prefix-len", "256", "--no-progress", "--json", str(result),
    )  # fmt: skip
    assert re.search(r"generated: +[\d,.]+ tok/s", out)
    assert "% of the floor's speed" in out
    report = json.loads(result.read_text())
    first = report["runs"][0]
    assert first["prompt_tokens"] >= 4 * 276
    assert first["cached_tokens"] == 3 * 256  # one block of the prefix, for all but the first
    assert 20 <= first["output_tokens"] <= 36
    assert all(seconds > 0 for seconds in report["floor_seconds"].values())


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_readme_code_runs(
    code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lm_eval" in code:
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(ROOT)
    exec(code.replace("Qwen/Qwen3-0.6B", str(DEMO)), {})
    assert capsys.readouterr().out.strip()


def test_example_streams() -> None:
    out = run("example.py", "--stream", "--prompt", "20+22=")
    assert "> 20+22=\n20 + 22 = 42\n" in out


def test_readme_lists_every_option() -> None:
    from dataclasses import fields

    from nanovllm import SamplingParams
    from nanovllm.config import Config

    for field in fields(Config):
        if field.init and field.name != "model":
            assert f"| `{field.name}` | " in README, field.name
    for field in fields(SamplingParams):
        assert f"`{field.name}`" in README, field.name
