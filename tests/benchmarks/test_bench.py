"""bench.py: rates, and the floor that they are held against."""

import json
import re
from pathlib import Path

from bench import Workload, floor_seconds
from helpers.paths import DEMO
from helpers.scripts import run_script
from nanovllm import LLM


def test_bench_reports_rates_and_floor(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    out = run_script(
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


def test_the_floor_has_what_is_necessary_alone(tiny: Path) -> None:
    with LLM(tiny, device="cpu", num_kvcache_blocks=64, max_model_len=100) as llm:
        config = llm.config
    shared, own = list(range(60)), [[i] * 10 for i in range(3)]
    many = floor_seconds(config, Workload([shared + tail for tail in own], [5] * 3), 1, 1, 60)
    apart = floor_seconds(config, Workload([shared + tail for tail in own], [5] * 3), 1, 1)
    one = floor_seconds(config, Workload([shared], [5]), 1, 1)
    assert one["prefill"] < many["prefill"] < apart["prefill"] - 1.9 * one["prefill"]
    cut = floor_seconds(config, Workload([own[0]], [500]), 1, 1)
    assert cut == floor_seconds(config, Workload([own[0]], [90]), 1, 1)
