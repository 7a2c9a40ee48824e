"""benchmarks/profile.py: every microsecond of a step is accounted for, once."""

import json
from pathlib import Path

import pytest

from bench import Workload, dummy_llm, floor_seconds
from benchmarks import gpu, profile


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
        ("_qkv_gemm_kernel", "_qkv_gemm_kernel", "matrix products"),
        ("_gated_gemm_kernel", "_gated_gemm_kernel", "matrix products"),
        ("_prefill_on_hopper_kernel", "_prefill_on_hopper_kernel", "attention"),
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
