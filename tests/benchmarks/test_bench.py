"""bench.py: rates, and the floor that they are held against."""

import json
import re
from pathlib import Path

import pytest

from bench import MINIATURE, Workload, dummy_llm, floor_seconds, layer_weights, write_shape
from helpers.paths import DEMO
from helpers.scripts import run_script
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.models import find_model_class
from nanovllm.models.qwen2_moe import Qwen2MoeConfig


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
    # Two of three requests need not read the shared tokens again, in each of four steps.
    kv_bytes = 2 * 2 * 2 * 32 * 4
    saved = apart["keys_and_values"] - many["keys_and_values"]
    assert saved == 2 * 4 * 60 * kv_bytes
    six = Workload([shared + tail for tail in own] * 2, [5] * 6)
    two = floor_seconds(config, six, 1, 1, 60, num_prefixes=2)
    assert two["keys_and_values"] == 2 * many["keys_and_values"]
    assert two["prefill"] == 2 * many["prefill"]
    cut = floor_seconds(config, Workload([own[0]], [500]), 1, 1)
    assert cut == floor_seconds(config, Workload([own[0]], [90]), 1, 1)


def test_weights_in_fp8_have_a_byte_each_and_twice_the_speed(tiny: Path) -> None:
    options = {"device": "cpu", "dtype": "bfloat16", "max_model_len": 100}
    plain, in_fp8 = (Config(str(tiny), **options, quantization=q) for q in (None, "fp8"))
    floors = [floor_seconds(c, Workload([[1]], [2]), 1, 1) for c in (plain, in_fp8)]
    layers = layer_weights(plain.model_config, 1)
    assert floors[0]["weights"] - floors[1]["weights"] == pytest.approx(layers)
    assert floors[0]["prefill"] - floors[1]["prefill"] == pytest.approx(layers)
    assert floors[0]["keys_and_values"] == floors[1]["keys_and_values"]


def test_a_step_of_experts_reads_those_that_are_hit(tmp_path: Path) -> None:
    write_shape("qwen3-30b-a3b", str(tmp_path))
    content = json.loads((tmp_path / "config.json").read_text())
    config = find_model_class(content).config_class.from_json(content)
    assert layer_weights(config, 1) == pytest.approx(3.3e9 - 2 * 151936 * 2048, rel=0.03)
    assert layer_weights(config, 10**6) == pytest.approx(30.5e9 - 2 * 151936 * 2048, rel=0.003)
    expert, two = 3 * 2048 * 768, layer_weights(config, 2) - layer_weights(config, 1)
    assert two == pytest.approx(48 * expert * 8 * (1 - 8 / 128))
    config = Qwen2MoeConfig.from_json({})  # Qwen1.5-MoE-A2.7B, with a shared expert
    assert layer_weights(config, 1) == pytest.approx(2.7e9 - 2 * 151936 * 2048, rel=0.03)
    assert layer_weights(config, 10**6) == pytest.approx(14.3e9 - 2 * 151936 * 2048, rel=0.003)


def test_the_floor_of_a_mixture_counts_the_rows_of_each_step() -> None:
    changes = MINIATURE | {"torch_dtype": "float32"}
    options = {"device": "cpu", "num_kvcache_blocks": 64, "max_model_len": 100}
    with dummy_llm("qwen3-30b-a3b", changes, **options) as llm:
        config = llm.config
        outputs = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), use_tqdm=False)
        assert len(outputs[0]["token_ids"]) in (1, 2, 3)
    sizes = [layer_weights(config.model_config, rows) for rows in (1, 2)]
    head = config.model_config.vocab_size * config.model_config.hidden_size
    floor = floor_seconds(config, Workload([[1], [2]], [3, 5]), 1, 1)
    assert floor["weights"] == pytest.approx(4 * (2 * sizes[1] + 2 * sizes[0] + 4 * head))
