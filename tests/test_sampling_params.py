"""SamplingParams: what they refuse, each by its name."""

import math
from dataclasses import replace

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams

NAN, INF = math.nan, math.inf
BAD_PARAMS = [
    ("top_k", [-2, -(2**70)], [1.0, "5", None, True, [5], NAN]),
    ("top_p", [0, 0.0, -0.1, 1.0001, NAN, INF, -INF, 10**400], ["1", None, True, [1]]),
    ("min_p", [-1e-9, 1.0001, NAN, INF, -INF], ["0", None, False, np.bool_(True)]),
    ("min_tokens", [-1, 65], [1.0, None, True, "1"]),
    ("max_tokens", [0, -1], [1.0, "1", False, INF]),
    ("presence_penalty", [-2.001, 2.001, NAN, INF], ["1", None, True, 1j]),
    ("frequency_penalty", [-2.001, 2.001, NAN, -INF], ["1", None, True, [0]]),
    ("repetition_penalty", [0, 0.0, -0.0, -1, NAN, INF, 10**400], ["1", None, True]),
    ("n", [0, -1], [1.0, None, True, "2"]),
    ("logprobs", [-1, -(2**70)], [1.0, True, False, "1"]),
    ("prompt_logprobs", [-1], [1.0, True, "1"]),
    ("ignore_eos", [], [0, 1, None, "yes", np.bool_(True)]),
    ("skip_special_tokens", [], [0, None]),
    ("include_stop_str_in_output", [], [1, None]),
    ("stop_token_ids", [], [5, "5", {5}, {5: 1}, [5.0], ["5"], [None], [True], [[5]], range(3)]),
    ("allowed_token_ids", [[], ()], [5, "5", {5}, [5.0], ["5"], [None], [True], b"5"]),
    (
        "logit_bias", [{5: NAN}, {5: INF}, {5: -INF}, {5: 10**400}],
        [5, [5], [(5, 1.0)], "5", {"5": 1}, {5.0: 1}, {True: 1}, {None: 1}, {5: None}, {5: "1"},
         {5: True}],
    ),
    ("stop", ["", ["a", ""]], [5, b"a", ["a", 5], [None], {"a"}, True]),
    ("bad_words", ["", ["a", ""], " ", ["a", "\n"]], [5, b"a", ["a", 5], [None], {"a"}, True]),
    ("structured_outputs", [{}], [5, "json", [], True, {"schema": {}}]),
    ("seed", [2**64, -(2**63) - 1], [1.0, "1", True]),
    ("temperature", [-1e-9, NAN, INF, -INF, 10**400], [None, "1", True, 1j, np.ones(2)]),
]  # fmt: skip
BAD_CASES = [
    (name, value, error)
    for name, values, types in BAD_PARAMS
    for error, cases in ((ValueError, values), (TypeError, types))
    for value in cases
]


@pytest.mark.parametrize(
    ("name", "value", "error"), BAD_CASES, ids=[f"{n}={str(v)[:12]}" for n, v, _ in BAD_CASES]
)
def test_an_impossible_value_is_refused_by_name(name: str, value: object, error: type):
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


def test_unknown_sampling_param_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


@pytest.mark.parametrize(
    "others",
    [
        {"best_of": None}, {"best_of": 2, "n": 2},
        {"use_beam_search": False, "length_penalty": 1.0},
        {"early_stopping": False, "detokenize": True, "spaces_between_special_tokens": True},
        {"logits_processors": [], "bad_words": (), "guided_decoding": None, "extra_args": {}},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken(others: dict):
    n = others.get("n", 1)
    assert SamplingParams(**others) == SamplingParams(n=n)
    assert replace(SamplingParams(**others), top_k=3) == SamplingParams(n=n, top_k=3)


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("best_of", 4, "cumulative_logprob"), ("use_beam_search", True, "beam search"),
        ("detokenize", False, "skip_tokenizer_init"), ("logits_processors", [print], "logit_bias"),
        ("guided_decoding", {"json": "{}"}, "structured_outputs"),
        ("truncate_prompt_tokens", 5, "token ids before"), ("length_penalty", 0.8, "beam search"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_with_the_way_out(name: str, value: object, way_out: str):
    with pytest.raises(ValueError, match=f"{name}=.*{way_out}"):
        SamplingParams(**{name: value})


def test_more_completions_than_anyone_wants_are_refused():
    with pytest.raises(ValueError, match="n must be at most 16384"):
        SamplingParams(n=10**9)


@pytest.mark.parametrize("penalty", [9e-6, 1.1e5, 1e-300, 1e300])
def test_a_repetition_penalty_that_could_overflow_is_refused(penalty: float):
    with pytest.raises(ValueError, match="repetition_penalty must be a finite number, 1e-5 to"):
        SamplingParams(repetition_penalty=penalty)


def test_min_tokens_may_be_max_tokens_and_no_more():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=1000, max_tokens=None).max_tokens is None
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens \(5\), got 6"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_params_copy_what_they_are_given():
    stops, bias = [5, 6], {5: 1.0}
    params = SamplingParams(stop_token_ids=stops, allowed_token_ids=stops, logit_bias=bias)
    stops.append(-1)
    bias[-1] = NAN
    assert params == SamplingParams(
        stop_token_ids=[5, 6], allowed_token_ids=(5, 6), logit_bias={5: 1}
    )


def test_fields_that_are_assigned_later_are_checked_when_used(llm: LLM):
    params = SamplingParams(temperature=0, max_tokens=3)
    assert params.checked() is params and params.clone() is not params
    params.max_tokens, params.stop_token_ids = 5, [7, 7]
    (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)
    assert len(output.token_ids) == 5
    params.top_p = 0
    with pytest.raises(ValueError, match="top_p must be above 0"):
        llm.generate([1, 2, 3], params)
    params.top_p = 1.0
    assert len(llm.generate([1, 2, 3], params, use_tqdm=False)[0].token_ids) == 5


def test_params_have_names():
    with pytest.raises(TypeError):
        SamplingParams(0.5)
