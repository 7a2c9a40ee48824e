"""The threshold of top-k, top-p and min-p against float64 over sorted logits, written out here.

With few lanes a small vocabulary makes the kernel search below its floor, as a large one would.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.cases import slow
from helpers.kernel_inputs import (
    BF16,
    FP16,
    FP32,
    interpreted,
    normal,
    on_cpu,
    on_cpu_in_fp16,
    on_gpu,
)
from nanovllm.kernels import truncate
from nanovllm.kernels.truncate import truncation_thresholds as truncation_thresholds_triton
from nanovllm.layers.sampler import truncation_thresholds as truncation_thresholds_torch

pytestmark = pytest.mark.usefixtures("poison")
both = pytest.mark.parametrize(
    "function", [truncation_thresholds_triton, truncation_thresholds_torch]
)
INF = float("inf")


class Options(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


OFF = Options()


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(truncate, "LANES", 8)


def run(function: Callable, logits: torch.Tensor, rows: list[Options]) -> torch.Tensor:
    columns = zip(*rows, strict=True)
    dtypes = (FP32, torch.int32, FP32, FP32)
    thresholds = function(
        logits, *(torch.tensor(c, dtype=d, device=logits.device) for c, d in zip(columns, dtypes))
    )
    assert thresholds.dtype == FP32 and thresholds.shape == (len(rows),)
    return thresholds


def number_kept(ordered: torch.Tensor, options: Options, slack: float) -> int:
    """Of logits in descending order, float64; a slack above 0 widens the options, below narrows."""
    temperature, top_k, top_p, min_p = options
    if temperature == 0:
        return len(ordered)
    kept = ordered
    weights = ((ordered - ordered[0]) / temperature).exp()
    if min_p > 0:
        # The bound, a float32 near the peak, is a step of it off at worst.
        widened = min_p * (1 - slack) - math.copysign(2e-7 * abs(ordered[0]) / temperature, slack)
        kept = kept[: max(1, int((weights >= widened).sum()))]
        kept = ordered[ordered >= kept[-1]]
    if 0 < top_k < len(kept):
        kept = ordered[ordered >= kept[top_k - 1]]
    if top_p < 1:
        sums = weights[: len(kept)].cumsum(0)
        enough = (sums >= min(1.0, top_p * (1 + slack)) * sums[-1]).nonzero()
        kept = ordered[ordered >= kept[enough[0, 0]]]
    return len(kept)


def check(thresholds: torch.Tensor, logits: torch.Tensor, rows: list[Options]) -> int:
    """The number of rows of which float64 leaves no doubt how many tokens they keep."""
    certain = 0
    for threshold, row, options in zip(thresholds.tolist(), logits, rows, strict=True):
        top_p = torch.tensor(options.top_p).item()  # as float32 has it
        min_p = torch.tensor(options.min_p).item()
        options = options._replace(top_p=top_p, min_p=min_p)
        ordered = row.double().sort(descending=True).values
        kept = int((row.float() >= threshold).sum())
        least, most = (number_kept(ordered, options, slack) for slack in (-1e-5, 1e-5))
        assert max(1, least) <= kept <= most, options
        certain += least == most
        is_on = options.top_p < 1 or options.min_p > 0 or 0 < options.top_k < len(row)
        if options.temperature == 0 or not is_on:
            assert threshold == -INF
        elif not (row == threshold).any():
            peak, below = row.double().max().item(), options.temperature * math.log(min_p)
            # Float32 rounds both terms, which may cancel each other out, and has no more than 3e38.
            rounding = max(1e-6, 2.0**-22 * (abs(peak) + abs(below)))
            bound = torch.tensor(peak + below, dtype=FP32).item()
            assert threshold == pytest.approx(bound, rel=1e-6, abs=rounding), options
    return certain


def mixed(function: Callable, vocab: int, temperatures: list[float]) -> list[Options]:
    """Options alone and together: all for the twin, some for the interpreter, ten a second."""
    ks = [0, 1, 2, 7, vocab // 2, vocab - 1, vocab, vocab + 5]
    ps = [1.0, 1e-6, 0.3, 0.9, 0.999]
    ms = [0.0, 0.02, 0.4, 1.0]
    rows = [Options(top_k=k) for k in ks] + [Options(0.8, top_p=p) for p in ps]
    rows += [Options(0.8, min_p=m) for m in ms]
    rows += [Options(*row) for row in product(temperatures, ks, ps, ms)]
    # 97 has no divisor in common with a side of the grid: every value takes its turn.
    return rows if function is truncation_thresholds_torch else rows[2:17:2] + rows[17::97]


@interpreted
@both
@on_cpu_in_fp16
@pytest.mark.parametrize(("vocab", "scale"), [(1, 3.0), (31, 3.0), (60, 0.1), (60, 3.0)])
def test_options_alone_and_together(function, vocab: int, scale: float, dtype) -> None:
    rows = mixed(function, vocab, [0.3, 1.0, 2.0])
    logits = (normal(len(rows), vocab, dtype=FP32, seed=vocab) * scale).to(dtype)
    certain = check(run(function, logits, rows), logits, rows)
    assert certain > 0.9 * len(rows)


@interpreted
@both
def test_extreme_temperatures(function) -> None:
    rows = mixed(function, 40, [1e-5, 1e30, 3e38, 1e-38])
    logits = normal(len(rows), 40, dtype=FP16) * 3
    check(run(function, logits, rows), logits, rows)


@interpreted
@both
@on_cpu
def test_many_ties(function, dtype) -> None:
    rows = mixed(function, 50, [0.5, 1.0])
    logits = (normal(len(rows), 50, dtype=FP32) * 2).round().to(dtype)
    logits[::2] = -logits[::2].abs()  # the largest is -0.0
    check(run(function, logits, rows), logits, rows)


@interpreted
@both
@on_cpu_in_fp16
@pytest.mark.parametrize("finite", [1, slow(3), 30])
def test_minus_infinity(function, finite: int, dtype) -> None:
    rows = [row for row in mixed(function, 60, [0.5, 1e30]) if not finite <= row.top_k < 60]
    logits = torch.full((len(rows), 60), -INF, dtype=dtype)
    logits[:, 20 : 20 + finite] = normal(len(rows), finite, dtype=dtype)
    check(run(function, logits, rows), logits, rows)
    rows = [Options(top_k=finite + 1), Options(0.7, finite + 1, 0.999), Options(0.7, 0, 1.0, 1e-3)]
    thresholds = run(function, logits[:3], rows).tolist()
    assert thresholds[0] == -INF and min(thresholds[1:]) > -INF
    nothing = torch.full((1, 60), -INF, dtype=dtype)
    assert run(function, nothing, [Options(0.5, 3, 0.9, 0.1)]).item() == -INF


@interpreted
@both
@on_cpu_in_fp16
@pytest.mark.parametrize("value", [-0.0, -7.5, 12.0])
def test_equal_logits_are_all_kept(function, value: float, dtype) -> None:
    rows = [
        (1.0, 1),
        (1.0, 39),
        (0.5, 0, 1e-6),
        (0.5, 0, 0.999),
        (1e30, 17, 0.9, 0.5),
        (1.0, 0, 1.0, 1.0),
    ]
    logits = torch.full((len(rows), 40), value, dtype=dtype)
    assert (run(function, logits, [Options(*row) for row in rows]) == value).all()


@interpreted
@both
def test_ties_at_the_boundary(function) -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0, 2.0, 2.0]]).repeat(5, 1)
    rows = [Options(top_k=k) for k in (1, 2, 3, 4, 5)]
    assert run(function, logits, rows).tolist() == [3.0, 2.0, 2.0, 2.0, 1.0]
    # Of 10 the weights: the token that reaches the sum stays, and with it its equal.
    weights = torch.tensor([2.0, 1.0, 4.0, 1.0, 2.0])
    top_p = {0.01: 4, 0.39: 4, 0.41: 2, 0.59: 2, 0.79: 2, 0.81: 1, 0.99: 1}
    rows = [Options(top_p=p) for p in top_p]
    thresholds = run(function, weights.log().repeat(len(rows), 1), rows)
    assert thresholds.exp().round().tolist() == list(top_p.values())


@interpreted
@both
def test_options_apply_one_after_the_other(function) -> None:
    weight_of_last_kept = {
        Options(1.0, 0, 0.5): 3,
        Options(1.0, 2, 0.5): 4,  # of 7, as many as are left
        Options(1.0, 0, 0.75): 2,
        Options(1.0, 0, 0.75, 0.6): 3,  # min_p leaves 4 and 3
        Options(1.0, 3, 1.0, 0.6): 2.4,  # the bound
        Options(1.0, 1, 1.0, 0.6): 4,
        # At a temperature of 0.5 probabilities are as the squares: 16 of 30, 9, 4, 1.
        Options(0.5, 0, 0.5): 4,
        Options(0.5, 0, 1.0, 0.5): 4 / 2**0.5,
    }
    logits = torch.tensor([1.0, 4.0, 2.0, 3.0]).log().repeat(len(weight_of_last_kept), 1)
    thresholds = run(function, logits, list(weight_of_last_kept))
    assert thresholds.exp().tolist() == pytest.approx(list(weight_of_last_kept.values()))


@interpreted
@both
def test_nothing_is_cut_where_nothing_is_on(function) -> None:
    off = [OFF, Options(top_k=60), Options(top_k=2**31 - 1), Options(0.0, 5, 0.5, 0.5)]
    rows = [row for greedy_or_off in off for row in (greedy_or_off, Options(1.0, 3, 0.9, 0.1))]
    logits = normal(len(rows), 60, dtype=FP32)
    thresholds = run(function, logits, rows)
    assert (thresholds[::2] == -INF).all() and (thresholds[1::2] > -INF).all()
    check(thresholds, logits, rows)


@interpreted
@both
def test_a_row_depends_on_no_other(function) -> None:
    rows = mixed(function, 50, [0.0, 0.7])
    logits = normal(len(rows), 50, dtype=FP16) * 3
    together = run(function, logits, rows)
    alone = [run(function, logits[i : i + 1], rows[i : i + 1]) for i in range(0, len(rows), 5)]
    assert torch.equal(together[::5], torch.cat(alone))


@interpreted
@pytest.mark.parametrize(
    "high", [8, 32]
)  # the likely tokens are the largest, or four, of each lane
def test_k_near_the_number_of_tokens_in_registers(high: int) -> None:
    rows = [Options(top_k=high - 1), Options(top_k=high), Options(top_k=high + 1)]
    rows += [row._replace(top_p=0.99) for row in rows]
    logits = normal(len(rows), 60, dtype=FP16)
    logits[:, :high] += 10
    check(run(truncation_thresholds_triton, logits, rows), logits, rows)


@interpreted
def test_all_of_the_likely_tokens_in_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncate, "LANES", 4096)
    rows = [(1.0, 4), (1.0, 5), (1.0, 0, 0.9), (1.0, 6, 0.95), (1.0, 20), (1.0, 5000, 0.9, 1e-3)]
    rows = [Options(*row) for row in [*rows, (5.0, 0, 0.7)]]
    logits = normal(len(rows), 6 * 4096 + 77, dtype=FP16)
    logits[:, 5::4096] += 10
    certain = check(run(truncation_thresholds_triton, logits, rows), logits, rows)
    assert certain == len(rows)


logit_lists = st.one_of(
    st.lists(st.sampled_from([-INF, -2.0, -0.0, 0.0, 1.0, 1.5, 30.0]), min_size=1, max_size=50),
    st.lists(st.floats(-40, 40, width=16), min_size=1, max_size=50),
).filter(lambda logits: max(logits) > -INF)
option_lists = st.lists(
    st.builds(
        Options,
        st.sampled_from([0.0, 1e-5, 0.1, 0.7, 1.0, 5.0, 1e30]),
        st.integers(0, 52),
        st.one_of(st.just(1.0), st.floats(2**-20, 1 - 2**-14, width=32)),
        st.one_of(st.sampled_from([0.0, 1.0]), st.floats(2**-20, 1, width=32)),
    ),
    min_size=1,
    max_size=3,
)


@interpreted
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(logit_lists, option_lists, st.sampled_from([4, 16]), st.sampled_from([FP32, FP16]))
@example([19.0], [Options(5.0, min_p=0.01565689593553543)], 4, FP32)
def test_any_row(logits: list[float], rows: list[Options], lanes: int, dtype) -> None:
    batch = torch.tensor(logits, dtype=dtype).repeat(len(rows), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncate, "LANES", lanes)
        for function in (truncation_thresholds_triton, truncation_thresholds_torch):
            check(run(function, batch, rows), batch, rows)


# On a GPU, at the size of a real vocabulary

VOCAB = 151936
RAGGED = [
    Options(*row)
    for row in [
        (0.6, 20, 0.95), (0.0, 20, 0.95), (1.0, 0, 0.9), (1.0,), (0.7, 1), (1.0, 1000),
        (1.0, 50000, 0.8), (2.0, 0, 0.999), (1.0, 0, 1.0, 0.05), (1.0, 100, 0.9, 0.01),
        (10.0, 0, 0.5), (1e-5, 3, 0.5), (1e30, 0, 0.3), (1.0, 0, 1e-6), (1.0, 0, 1.0, 1.0),
    ]
]  # fmt: skip


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_ragged_rows_gpu(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(2000, VOCAB, generator=generator, device="cuda", dtype=dtype).mul_(scale)
    rows = [RAGGED[i % len(RAGGED)] for i in range(len(logits))]
    thresholds = run(truncation_thresholds_triton, logits, rows)
    certain = check(thresholds, logits, rows)
    # In float32 alone many logits differ by less than the rounding of a wide top_p's sum.
    assert certain > (0.55 if dtype == FP32 else 0.8) * len(rows)
    assert torch.equal(thresholds, run(truncation_thresholds_triton, logits, rows))
    twins = run(truncation_thresholds_torch, logits, rows)
    kept, kept_by_twin = ((logits.float() >= t[:, None]).sum(1) for t in (thresholds, twins))
    assert (kept != kept_by_twin).sum() < 0.1 * len(rows)


@pytest.mark.gpu
@on_gpu
def test_ties_and_minus_infinity_gpu(dtype: torch.dtype) -> None:
    rows = RAGGED * 4
    logits = (normal(len(rows), VOCAB, dtype=FP32, device="cuda") * 2).round().to(dtype)
    logits[:15] = 1.5
    logits[15:30, 3:] = -INF
    logits[30:45, ::3] = -INF
    thresholds = run(truncation_thresholds_triton, logits, rows)
    finite = torch.tensor([not (15 <= i < 30 and row.top_k > 3) for i, row in enumerate(rows)])
    check(thresholds[finite], logits[finite], [row for row, yes in zip(rows, finite) if yes])


@pytest.mark.gpu
def test_offsets_beyond_32_bits_gpu() -> None:
    logits = torch.zeros(2**31 // VOCAB + 2, VOCAB, dtype=BF16, device="cuda")
    logits[-1, :3] = torch.tensor([3.0, 2.0, 1.0])
    rows = [OFF] * (len(logits) - 1) + [Options(1.0, 2)]
    thresholds = run(truncation_thresholds_triton, logits, rows)
    assert thresholds[-1] == 2.0 and (thresholds[:-1] == -INF).all()
