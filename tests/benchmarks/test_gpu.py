"""benchmarks/gpu.py at its smallest: it runs, and its figures add up."""

import json
from pathlib import Path

import pytest

from bench import Workload, write_shape
from benchmarks import gpu
from benchmarks.ready import seconds_to_ready
from nanovllm.config import Config

# Seconds by an H200's rates, worked out apart from this repository.
KNOWN_FLOORS = {"mix": 3.76, "batch 1": 0.294e-3, "batch 32": 0.619e-3, "prefill": 0.0813}
KNOWN_FLOORS |= {"rollout": 8.09, "prefix": 0.235, "common": 1.018e-3}


def test_gpu_measures_every_part(report: Path) -> None:
    rows = json.loads(report.read_text())["rows"]
    parts = {row["part"] for row in rows}
    by = {"by batch", "by context", "by model"}
    shared = {"rollout", "prefix", "common"}
    assert parts == {"mix", "batch", "prefill", "host", "options", *shared, *by}
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert len(row["runs"]) == 1 and row["runs"][0] == row["seconds"] > 0
        if row["part"] == "host":
            assert sum(row["detail"].values()) == pytest.approx(row["seconds"])
            assert row["detail"].keys() == {"schedule", "launch", "postprocess"}
        else:
            assert 0 < row["h200_floor"] < row["seconds"]
    (mix,) = (row for row in rows if row["part"] == "mix")
    output_tokens = sum(Workload.draw(*gpu.TINY.mix, 10**5, seed=0).output_lens)
    assert mix["tokens_per_second"] * mix["seconds"] == pytest.approx(output_tokens)


def test_gpu_counts_decode_steps(report: Path) -> None:
    """A step's floor grows by a request's keys and values, not by the number of steps."""
    rows = json.loads(report.read_text())["rows"]
    one, two, four = (row["h200_floor"] for row in rows if row["part"] == "by batch")
    assert four - two == pytest.approx(2 * (two - one))


@pytest.mark.slow
def test_gpu_times_a_fresh_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    has_bytecode = []

    def watched(model: Path, options: dict, caches: str) -> list[float]:
        has_bytecode.append(any(Path(caches).rglob("bytecode/**/torch/__init__*.pyc")))
        return seconds_to_ready(model, options, caches)

    monkeypatch.setattr(gpu, "seconds_to_ready", watched)
    path = tmp_path / "ready.json"
    gpu.main(["--tiny", "--only", "ready", "--json", str(path), "--runs", "2"])
    rows = json.loads(path.read_text())["rows"]
    stages = [f": {stage}" for stage in gpu.STAGES]
    assert [row["name"] for row in rows] == [
        f"ready, {state}{stage}" for state in ("cold", "warm") for stage in ("", *stages)
    ]
    assert all(seconds > 0 for row in rows for seconds in row["runs"])
    assert [len(row["runs"]) for row in rows] == [1] * 5 + [2] * 5
    for whole, *parts, _ in (rows[:5], rows[5:]):  # the first request is not counted
        times = zip(*(part["runs"] for part in parts))
        assert whole["runs"] == pytest.approx([sum(run) for run in times])
    assert has_bytecode == [False, True, True]  # kept whatever the environment says
    assert "| ready, warm: LLM(...) | nanovllm | " in capsys.readouterr().out


def test_gpu_workloads_are_those_of_the_peers(tmp_path: Path) -> None:
    write_shape("qwen3-0.6b", str(tmp_path))
    config = Config.from_options(tmp_path, {"device": "cpu"})
    args = gpu.parse_args(["--tiny"])
    bench = gpu.Bench(args, tmp_path)
    bench.sizes = gpu.Sizes()
    parts = ["mix", "batch", "prefill", "rollout", "prefix"]
    cases = {case.name: case for case in bench.cases(parts)}
    cases["common"] = bench.prefix_case("common", per_step=True)
    assert cases["mix"].tokens == 133_966
    assert sum(map(len, cases["mix"].workload.prompts)) == 142_827
    for name, floor in KNOWN_FLOORS.items():
        assert cases[name].floor(config, gpu.H200_RATES) == pytest.approx(floor, rel=2e-3), name


def test_gpu_reports_an_engine_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def time_calls(engine: str, model: Path, calls: list, engine_path: str | None) -> dict:
        raise RuntimeError(f"{engine}: not installed here")

    monkeypatch.setattr(gpu, "time_calls", time_calls)
    gpu.main(["--tiny", "--engine", "vllm", "--only", "prefill"])
    captured = capsys.readouterr()
    assert "vllm: not installed here" in captured.err
    assert "| prefill |" not in captured.out


def test_gpu_takes_another_engines_decode_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is the call's time less that of its first token, over the tokens after it."""

    def time_calls(engine: str, model: Path, calls: list, engine_path: str | None) -> dict:
        seconds = [1 + 0.5 * (max(call["output_lens"]) - 1) for call in calls]
        first_prompts = [call["prompts"][0] for call in calls]
        assert len(set(map(tuple, first_prompts))) == len(calls)  # no prompt comes twice
        return {"version": "1", "ready": 2.0, "seconds": seconds}

    monkeypatch.setattr(gpu, "time_calls", time_calls)
    made: list[gpu.Row] = []
    monkeypatch.setattr(gpu.Bench, "add", lambda self, row: made.append(row))
    gpu.main(["--tiny", "--engine", "transformers", "--only", "batch", "prefill", "--runs", "2"])
    assert [(row.name, row.runs) for row in made] == [
        ("ready: import and LLM(...)", [2.0]), ("batch 1", [0.5, 0.5]), ("batch 32", [0.5, 0.5]),
        ("prefill", [1.0, 1.0]),
    ]  # fmt: skip
