"""`bench.py --plot`: what is recorded of a run, and that it becomes a picture."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import bench
from benchmarks import timeline
from helpers.paths import DEMO
from nanovllm import LLM, SamplingParams

PROMPTS = [[5 + index] * (8 + 5 * index) for index in range(6)]
SMALL_CACHE = {
    "kvcache_block_size": 16, "num_kvcache_blocks": 14, "max_num_batched_tokens": 48,
    "max_model_len": 200,
}  # fmt: skip


def test_bench_draws_its_last_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[timeline.Moment], int, str]] = []
    draw = timeline.draw

    def spy(moments: list[timeline.Moment], num_blocks: int, title: str, path: Path) -> None:
        drawn.append((moments, num_blocks, title))
        draw(moments, num_blocks, title, path)

    picture, figures = tmp_path / "run.png", tmp_path / "run.json"
    monkeypatch.setattr(timeline, "draw", spy)
    monkeypatch.setattr(bench, "measure_machine", lambda device: (1e9, 1e9))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL_CACHE.items()]
    command = [
        "bench.py", "--model", str(DEMO), "--num-requests", "6", "--input-len", "20", "40",
        "--output-len", "30", "60", "--no-progress", "--plot", str(picture), "--json", str(figures),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command + options)
    bench.main()

    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    ((moments, num_blocks, title),) = drawn
    assert num_blocks == SMALL_CACHE["num_kvcache_blocks"]
    assert title.startswith("demo/tiny-qwen3 in bfloat16 on ") and "\n6 requests, " in title
    first, last = moments[0], moments[-1]
    result = json.loads(figures.read_text())["runs"][-1]
    assert last.prefill_tokens - first.prefill_tokens == result["prefill_tokens"]
    assert last.decode_tokens - first.decode_tokens == result["decode_tokens"]
    assert 0 < last.time - first.time < result["seconds"] + 1
    assert first.prefill_tokens > 0, "the first run only warms up"
    assert last.preemptions > first.preemptions
    assert max(moment.blocks for moment in moments) == num_blocks
    assert last.running > 0 and last.waiting == 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_recorded_tokens_are_those_of_the_requests(tiny: Path, async_scheduling: bool) -> None:
    """Counted apart from the engine's own figures: each prompt once, all tokens but the first."""
    params = [SamplingParams(max_tokens=1 + 3 * n, ignore_eos=True) for n in range(len(PROMPTS))]
    with LLM(tiny, num_kvcache_blocks=8, async_scheduling=async_scheduling) as llm:
        with timeline.recorded(llm) as moments:
            llm.generate(PROMPTS, params, use_tqdm=False)
        llm.generate(PROMPTS, params, use_tqdm=False)
        assert moments[-1].prefill_tokens == sum(map(len, PROMPTS))
    assert moments[-1].decode_tokens == sum(param.max_tokens - 1 for param in params)
    assert moments[0][1:] == (0, 0, 0, 0, 0, 0)
    times = [moment.time for moment in moments]
    assert times == sorted(set(times))


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_recording_changes_nothing(tiny: Path, async_scheduling: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(tiny, async_scheduling=async_scheduling, **SMALL_CACHE) as llm:
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = llm.metrics()
    with LLM(tiny, async_scheduling=async_scheduling, **SMALL_CACHE) as llm:
        with timeline.recorded(llm) as moments:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        recorded = llm.metrics()
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in expected]
    assert metrics["preemptions"] > 0
    for name, value in metrics.items():
        assert name.endswith("per_second") or recorded[name] == value, name
    assert max(moment.blocks for moment in moments) == metrics["kv_blocks_peak"]


def test_bars_are_whole_steps_of_one_kind_where_they_can_be() -> None:
    steps = [(True, 1.0)] * 4 + [(False, 0.01)] * 1000 + [(True, 1.0)] + [(False, 0.01)] * 333
    steps += [(True, 0.001), (False, 0.01)] * 40
    is_prefill, seconds = (np.array(column) for column in zip(*steps))
    ends = np.concatenate([[0], np.cumsum(seconds)])
    edges = timeline.bar_edges(ends, is_prefill)
    assert edges[0] == 0 and edges[-1] == len(steps) and edges == sorted(set(edges))
    assert len(edges) - 1 <= timeline.MOST_BARS
    assert edges[:5] == [0, 1, 2, 3, 4], "a long step has a bar of its own"
    assert {1004, 1005, 1338} <= set(edges), "bars end where the kind of step changes"


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    moments = [timeline.Moment(0, 0, 0, 0, 0, 0, 0), timeline.Moment(1, 5, 0, 0, 0, 1, 0)]
    timeline.draw(moments, 1, "one step", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere/run.png", "no directory for nowhere/run.png"),
        ("run.jpg", "writes a .png, got run.jpg"),
        ("run.png", "--plot needs matplotlib: pip install nanovllm[dev]"),
    ],
)
def test_plot_is_refused_before_anything_runs(
    picture: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setattr(bench, "dummy_llm", lambda *_, **__: pytest.fail("it runs"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--plot", picture])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
