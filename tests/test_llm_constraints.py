"""Rows whose next tokens the host restricts, in one batch with all other kinds."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.allowed import Allowed, allowed_after
from helpers.engines import BOTH_ORDERS, PROMPTS, assert_empty, build
from nanovllm import LLM, SamplingParams
from nanovllm.engine import input_processor, model_runner
from nanovllm.engine.sequence import Sequence

LENGTH = 20
STEPS = [7, 7, None, 30]  # of the constraint of each of PROMPTS
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 4, "logprobs": 2},
    {"temperature": 0.8, "top_k": 2, "seed": 5, "logit_bias": {1: 2.0}},
]
PARAMS = [SamplingParams(max_tokens=LENGTH, **options) for options in OPTIONS]


@pytest.fixture(autouse=True)
def constraints(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Allowed]]:
    """Each sequence whose seed has an entry in STEPS gets a constraint; by seed."""
    made: dict[int, Allowed] = {}

    def constrained(*args: Any) -> Sequence:
        prompt = args[1].tolist()
        index = next((i for i, own in enumerate(PROMPTS) if own == prompt), None)
        if index is None or STEPS[index] is None:
            return Sequence(*args)
        made[index] = Allowed(step=STEPS[index])
        return Sequence(*args[:6], constraint=made[index])

    monkeypatch.setattr(input_processor, "Sequence", constrained)
    return made


def expected_of(llm: LLM, index: int) -> list[int]:
    """Token by token, each a request of its own that allows the same ones."""
    prompt, tokens, last = PROMPTS[index], [], 0
    for position in range(LENGTH):
        options = dict(OPTIONS[index])
        if STEPS[index] is not None:
            options["allowed_token_ids"] = allowed_after(last, STEPS[index], 128)
        penalty = options.pop("frequency_penalty", 0)
        if penalty:  # it would count what is prompt here as generated
            options["logit_bias"] = {t: -penalty * tokens.count(t) for t in set(tokens)}
        # It is no prompt of PROMPTS, so that nothing constrains it.
        whole = [*prompt, *tokens] if position else [*prompt[:-1], prompt[-1]]
        params = SamplingParams(max_tokens=1, **options)
        (output,) = unconstrained(llm, whole, params)
        last = output["token_ids"][0]
        tokens.append(last)
    return tokens


def unconstrained(llm: LLM, prompt: list[int], params: SamplingParams) -> list:
    constrained = input_processor.Sequence
    input_processor.Sequence = Sequence  # type: ignore[misc]
    try:
        return llm.generate([prompt], params, use_tqdm=False)
    finally:
        input_processor.Sequence = constrained  # type: ignore[misc]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    with build(tiny) as llm:
        return [expected_of(llm, index) for index in range(len(PROMPTS))]


@BOTH_ORDERS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kvcache_blocks": 8, "max_model_len": 64},
        {"max_num_batched_tokens": 16},
    ],
    ids=["roomy", "preempted", "chunked"],
)
def test_every_token_is_one_that_may_come(
    tiny: Path,
    expected: list[list[int]],
    constraints: dict[int, Allowed],
    options: dict[str, int],
    async_scheduling: bool,
):
    with build(tiny, async_scheduling=async_scheduling, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected
        assert {index: one.accepted for index, one in constraints.items()} == {
            index: expected[index] for index in (0, 1, 3)
        }
        if "num_kvcache_blocks" in options:
            assert llm.scheduler.num_preemptions
        assert_empty(llm)


def test_late_rows_are_sampled_some_at_a_time(
    tiny: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Three rows of four."""
    monkeypatch.setattr(model_runner, "LATE_ROWS", 2)
    with build(tiny) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected


@BOTH_ORDERS
@pytest.mark.parametrize("allows_all", [False, True])
def test_a_constraint_that_leaves_all_tokens_changes_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, allows_all: bool, async_scheduling: bool
):
    """Penalties and biases stay, and each token is counted once."""
    monkeypatch.setattr(Allowed, "allows_all", allows_all)
    prompt = PROMPTS[0]
    biases = {prompt[-1]: 6.0, prompt[0]: 5.5, 9: 5.0}
    params = SamplingParams(
        temperature=0, max_tokens=LENGTH, logit_bias=biases, frequency_penalty=1.1
    )
    with build(tiny, async_scheduling=async_scheduling) as llm:
        (plain,) = unconstrained(llm, prompt, params)
        monkeypatch.setattr(
            input_processor, "Sequence", lambda *args: Sequence(*args[:6], constraint=Allowed())
        )
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output["token_ids"] == plain["token_ids"]
    assert max(map(plain["token_ids"].count, biases)) > 2


@pytest.mark.gpu
@BOTH_ORDERS
@pytest.mark.parametrize("all_are_late", [False, True])
def test_a_gpu_samples_tokens_that_may_come(
    tiny: Path,
    constraints: dict[int, Allowed],
    monkeypatch: pytest.MonkeyPatch,
    all_are_late: bool,
    async_scheduling: bool,
):
    """Each after its own, over graphs and prefill steps, next to a row that is free."""
    if all_are_late:
        monkeypatch.setattr(sys.modules[__name__], "STEPS", [7, 7, 9, 30])
    with build(
        tiny, device="cuda", num_kvcache_blocks=100, async_scheduling=async_scheduling
    ) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            for index, one in constraints.items():
                tokens = outputs[index]["token_ids"]
                assert one.accepted == tokens and len(tokens) == LENGTH
                for last, token in zip([0, *tokens], tokens):
                    assert token in allowed_after(last, STEPS[index], 128)


def test_ranks_sample_what_one_does(
    tiny: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    with build(tiny, tensor_parallel_size=2) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected
        monkeypatch.setattr(Allowed, "allows_all", True)  # no row is late
        (output,) = llm.generate(PROMPTS[2:3], PARAMS[2], use_tqdm=False)
        monkeypatch.setattr(
            input_processor, "Sequence", lambda *args: Sequence(*args[:6], constraint=Allowed())
        )
        (same,) = llm.generate(PROMPTS[2:3], PARAMS[2], use_tqdm=False)
        assert same["token_ids"] == output["token_ids"] == expected[2]


@BOTH_ORDERS
def test_a_row_without_any_token_left_ends_in_an_error_alone(
    tiny: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
):
    monkeypatch.setattr(sys.modules[__name__], "STEPS", [7, 7, None, 0])
    with build(tiny, async_scheduling=async_scheduling) as llm:
        with pytest.raises(RuntimeError, match="prompt 3: no token is left to sample") as caught:
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        *others, bad = caught.value.finished_outputs
        assert [output["token_ids"] for output in others] == expected[:3]
        assert (bad["finish_reason"], bad["token_ids"]) == ("error", [])
        assert_empty(llm)


def test_a_stop_string_or_an_abort_ends_a_constrained_row(tiny: Path, expected: list[list[int]]):
    with build(tiny) as llm:
        stop = SamplingParams(temperature=0, max_tokens=LENGTH, stop_token_ids=[expected[0][3]])
        ids = [llm.add_request(PROMPTS[0], stop), llm.add_request(PROMPTS[1], PARAMS[1])]
        for _ in range(3):
            llm.step()
        llm.abort(ids[1])
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        (output,) = outputs
        assert output["token_ids"] == expected[0][: expected[0].index(expected[0][3]) + 1]
        assert_empty(llm)


@BOTH_ORDERS
@pytest.mark.parametrize("size", [1, 2])
def test_log_probabilities_of_a_row_without_a_token(
    tiny: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    async_scheduling: bool,
    size: int,
):
    monkeypatch.setattr(sys.modules[__name__], "STEPS", [7, 7, None, 0])
    params = [*PARAMS[:3], SamplingParams(max_tokens=LENGTH, seed=5, logprobs=2)]
    with build(tiny, async_scheduling=async_scheduling, tensor_parallel_size=size) as llm:
        with pytest.raises(RuntimeError, match="prompt 3: no token is left") as caught:
            llm.generate(PROMPTS, params, use_tqdm=False)
        *others, bad = caught.value.finished_outputs
        assert [output["token_ids"] for output in others] == expected[:3]
        assert bad["logprobs"] == [] and not llm.is_closed
