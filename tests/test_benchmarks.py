"""The scripts in benchmarks/, each at its smallest: they run, and their figures add up."""

import json
from pathlib import Path

import pytest
import torch

from bench import Workload, dummy_llm, floor_seconds, write_shape
from benchmarks import gpu, peers, plot, profile, soak
from benchmarks.ready import seconds_to_ready
from nanovllm import LLM
from nanovllm.config import Config

# Seconds by an H200's rates, worked out apart from this repository.
KNOWN_FLOORS = {"mix": 3.76, "batch 1": 0.294e-3, "batch 32": 0.619e-3, "prefill": 0.0813}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `benchmarks.gpu` writes for a miniature of everything but a fresh process."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    parts = [part for part in gpu.PARTS if part != "ready"]
    gpu.main(["--tiny", "--runs", "1", "--json", str(path), "--only", *parts])
    return path


def test_gpu_measures_every_part(report: Path) -> None:
    rows = json.loads(report.read_text())["rows"]
    parts = {row["part"] for row in rows}
    assert parts == {"mix", "batch", "prefill", "host", "by batch", "by context", "by model"}
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
    cases = {case.name: case for case in bench.cases(["mix", "batch", "prefill"])}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("main", [gpu.main, profile.main])
def test_full_size_needs_a_gpu(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--tiny" in capsys.readouterr().err


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


def test_plot_draws_the_report(report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "docs" / "scaling.png"
    plot.main([str(report), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_wants_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rows": [], "device": "none"}))
    with pytest.raises(SystemExit):
        plot.main([str(path), str(tmp_path / "scaling.png")])
    assert "no scaling figures" in capsys.readouterr().err


def test_profile_accounts_for_the_step(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    sizes = ["--batch", "1", "2", "--context", "20", "--steps", "4", "--prefill", "2", "16"]
    profile.main(["--tiny", *sizes, "--json", str(path)])
    tables = json.loads(path.read_text())
    assert [table["step"]["tokens"] for table in tables] == [1, 2, 32]
    for table in tables:
        total = pytest.approx(table["busy_microseconds"])
        assert sum(kernel["microseconds"] for kernel in table["kernels"]) == total
        assert sum(group["microseconds"] for group in table["groups"]) == total
        assert any(group["group"] == "matrix products" for group in table["groups"])


@pytest.mark.parametrize(
    ("spans", "times"),
    [
        ([], []),
        ([(0, 2), (5, 6)], [2, 1]),  # a gap belongs to nobody
        ([(0, 10), (1, 12), (9, 20), (11, 21)], [10, 2, 8, 1]),  # waiting is not work
        ([(11, 21), (0, 10), (9, 20), (1, 12)], [1, 10, 8, 2]),  # whatever their order
        ([(5, 10), (0, 10)], [0, 10]),
        ([(0, 4), (2, 2)], [2, 0]),
    ],
)  # fmt: skip
def test_profile_counts_overlapping_time_once(
    spans: list[tuple[float, float]], times: list[float]
) -> None:
    assert profile.advances(spans) == times


@pytest.mark.parametrize(
    ("kernel", "name", "group"),
    [
        ("_rms_norm_kernel", "_rms_norm_kernel", "norm"),
        ("_decode_kernel", "_decode_kernel", "attention"),
        ("void flash::flash_fwd_splitkv_kernel<Traits<128, 4>, true>(flash::Params)",
         "flash::flash_fwd_splitkv_kernel", "attention"),
        ("void flash::flash_fwd_splitkv_combine_kernel<T<1>>(P)",
         "flash::flash_fwd_splitkv_combine_kernel", "attention, combine"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_tst_64x8_64x16_4x1_v_bz_TNT",
         "matrix products"),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, float>(int)",
         "internal::gemvx::kernel", "matrix products"),
        ("void at::native::(anonymous namespace)::index_kernel<c10::BFloat16>(int)", "index_kernel",
         "other"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD", "copies"),
    ],
)  # fmt: skip
def test_profile_names_kernels(kernel: str, name: str, group: str) -> None:
    assert (profile.short_name(kernel), profile.group_of(profile.short_name(kernel))) == (
        name,
        group,
    )


def test_profile_counts_the_work_of_the_floor() -> None:
    """Weights, keys and values of a decode step are those that bench.py counts."""
    with dummy_llm("qwen3-0.6b", gpu.MINIATURE, device="cpu") as llm:
        workload = Workload([[1] * 9] * 3, [2] * 3)
        floor = floor_seconds(llm.config, workload, 1, 1)
        step = profile.Step(is_prefill=False, rows=3, tokens=3, contexts=30)
        assert profile.work("matrix products", llm, step) == (floor["weights"], 0)
        assert profile.work("attention", llm, step) == (floor["keys_and_values"], 0)


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
