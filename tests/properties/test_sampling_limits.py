"""Sampling options at the ends of what they may be."""

import itertools

import numpy as np
import pytest
import torch

from helpers.engines import BOTH_ORDERS
from helpers.small_model import (
    EOS,
    PROMPT,
    VOCAB,
    Model,
    Options,
    build,
    chi_squared,
    sample,
    summary,
    tokens_of,
    words,
)
from nanovllm import LLM, SamplingParams

SEEDS = [{"seed": seed, "ignore_eos": True} for seed in range(4)]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-300}, {"min_p": 1}, {"temperature": 1e-6},
        {"temperature": 9.9e-6}, {"temperature": 1e-300}, {"top_k": 1, "temperature": 1e6},
        {"top_p": 1e-9, "temperature": 5}, {"min_p": 1.0, "temperature": 30},
        {"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 0, "top_p": 1e-300, "min_p": 1, "top_k": 2**80},
    ],
    ids=str,
)  # fmt: skip
def test_these_are_greedy(llm: LLM, options: Options):
    (greedy,) = tokens_of(sample(llm, {"temperature": 0, "ignore_eos": True}))
    assert tokens_of(sample(llm, *(seed | options for seed in SEEDS))) == [greedy] * len(SEEDS)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0}, {"top_k": -1}, {"top_k": VOCAB}, {"top_k": VOCAB + 1}, {"top_k": 2**31},
        {"top_k": 2**80}, {"top_p": 1.0}, {"top_p": 1}, {"top_p": 1 - 1e-15}, {"min_p": 0},
        {"min_p": 1e-300}, {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"repetition_penalty": 1}, {"logit_bias": {}}, {"logit_bias": {3: 0, 14: 0.0}},
        {"logit_bias": None}, {"allowed_token_ids": list(range(VOCAB))},
        {"allowed_token_ids": [*range(VOCAB), 3, 3]}, {"allowed_token_ids": None},
        {"min_tokens": 0}, {"min_tokens": 12}, {"stop_token_ids": []}, {"stop_token_ids": None},
        {"temperature": np.float32(1), "top_k": np.int64(0), "top_p": np.float64(1)},
        {"n": 1}, {"logprobs": 0, "prompt_logprobs": 0}, {"stop": None}, {"stop": []},
    ],
    ids=lambda options: str(options)[:60],
)  # fmt: skip
def test_these_change_nothing(llm: LLM, options: Options):
    found = tokens_of(sample(llm, *SEEDS, *(seed | options for seed in SEEDS)))
    assert found[: len(SEEDS)] == found[len(SEEDS) :]


def test_a_temperature_beyond_all_logits_makes_all_tokens_equally_likely(llm: LLM):
    for temperature in (1e30, 1e300):
        options = {"temperature": temperature, "max_tokens": 1}
        found = tokens_of(sample(llm, *({"seed": seed} | options for seed in range(400))))
        expected = {(token,): 1 / VOCAB for token in range(VOCAB)}
        assert chi_squared(list(map(tuple, found)), expected) > 1e-3


def test_bias_of_100_decides_and_larger_ones_are_100(llm: LLM):
    base = {"ignore_eos": True}
    found = sample(llm, *(seed | base | {"logit_bias": {7: 100}} for seed in SEEDS))
    assert tokens_of(found) == [[7] * 12] * len(SEEDS)
    twice, same = (
        tokens_of(sample(llm, *(seed | base | {"logit_bias": bias} for seed in SEEDS)))
        for bias in ({7: 1e9, 8: 3e38, 9: 100}, {7: 100, 8: 100, 9: 100})
    )
    assert twice == same and {*itertools.chain(*same)} == {7, 8, 9}


def test_bias_of_minus_100_forbids(llm: LLM):
    bias = {token: -100 - token * 1e30 for token in range(VOCAB) if token not in (40, 41)}
    found = tokens_of(sample(llm, *(seed | {"logit_bias": bias} for seed in SEEDS)))
    assert {*itertools.chain(*found)} == {40, 41}
    found = tokens_of(sample(llm, *(seed | {"logit_bias": {14: -100}} for seed in SEEDS)))
    assert 14 not in {*itertools.chain(*found)}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0}, {"temperature": 1e30}, {"logit_bias": {6: -100, 7: 100}},
        {"top_k": 1, "top_p": 0.1, "min_p": 1}, {"min_tokens": 12},
        {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 50.0},
        {"presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 0.02},
    ],
    ids=str,
)  # fmt: skip
def test_one_allowed_token_is_the_only_one(llm: LLM, options: Options):
    found = sample(llm, *(seed | {"allowed_token_ids": [6]} | options for seed in SEEDS))
    assert tokens_of(found) == [[6] * 12] * len(SEEDS)


def test_allowed_end_of_sequence_token_alone_ends_at_once(llm: LLM):
    (output,) = sample(llm, {"allowed_token_ids": [EOS]})
    assert summary(output) == [([EOS], "stop", None)]
    (output,) = sample(llm, {"allowed_token_ids": [EOS], "ignore_eos": True})
    assert summary(output) == [([EOS] * 12, "length", None)]


def test_no_stop_token_comes_before_min_tokens(llm: LLM):
    stops = [token for token in range(VOCAB) if token not in (5, 6)]
    for temperature in (0, 1, 1e30):
        options = {"stop_token_ids": stops, "logit_bias": {EOS: 100}, "temperature": temperature}
        many = [options | {"seed": n, "min_tokens": n} for n in range(13)]
        *outputs, last = sample(llm, *many)
        for n, output in enumerate(outputs):
            *before, end = output["token_ids"]
            assert len(before) == n and {*before} <= {5, 6}
            assert (end in stops, output["finish_reason"]) == (True, "stop")
        assert {*last["token_ids"]} <= {5, 6} and len(last["token_ids"]) == 12
        assert last["finish_reason"] == "length", "min_tokens is max_tokens"


def test_min_tokens_without_any_stop_token_changes_nothing(llm: LLM):
    expected = tokens_of(sample(llm, *SEEDS))
    assert tokens_of(sample(llm, *(seed | {"min_tokens": 9} for seed in SEEDS))) == expected


def test_min_tokens_holds_back_the_end_of_sequence_token_even_if_ignored(llm: LLM):
    options = {"logit_bias": {EOS: 100}, "min_tokens": 4, "max_tokens": 6, "seed": 0}
    ends, ignores, both = sample(
        llm, options, options | {"ignore_eos": True},
        options | {"ignore_eos": True, "stop_token_ids": [EOS]},
    )  # fmt: skip
    assert EOS not in ends["token_ids"][:4] and ends["token_ids"][4:] == [EOS]
    assert ignores["token_ids"] == ends["token_ids"] + [EOS]
    assert both["token_ids"] == ends["token_ids"]
    assert [o["stop_reason"] for o in (ends, ignores, both)] == [None, None, EOS]


def test_the_first_of_several_stop_tokens_ends_the_request(llm: LLM):
    options = {"ignore_eos": True, "seed": 5, "max_tokens": 30, "temperature": 1.5}
    (tokens,) = tokens_of(sample(llm, options))
    for stops in ([tokens[9], tokens[3], tokens[20]], (tokens[20], tokens[9]), [tokens[20]] * 3):
        (output,) = sample(llm, options | {"stop_token_ids": stops})
        end = min(tokens.index(stop) for stop in stops)
        assert summary(output) == [(tokens[: end + 1], "stop", tokens[end])]


def test_a_stop_token_in_the_prompt_does_not_end_the_request(llm: LLM):
    (output,) = sample(llm, {"stop_token_ids": PROMPT, "allowed_token_ids": [30, 31]})
    assert (len(output["token_ids"]), output["finish_reason"]) == (12, "length")


def test_end_of_sequence_among_the_stop_tokens_ends_also_if_ignored(llm: LLM):
    base = {"logit_bias": {EOS: 100}}
    for options, expected in [
        ({}, ([EOS], "stop", None)),
        ({"stop_token_ids": [3, EOS]}, ([EOS], "stop", None)),
        ({"stop_token_ids": [3, EOS], "ignore_eos": True}, ([EOS], "stop", EOS)),
        ({"stop_token_ids": [3], "ignore_eos": True}, ([EOS] * 12, "length", None)),
    ]:
        (output,) = sample(llm, base | options)
        assert summary(output) == [expected]


def test_stop_at_the_last_token_is_a_stop(llm: LLM):
    base = {"logit_bias": {EOS: 100}, "ignore_eos": True, "max_tokens": 4}
    (output,) = sample(llm, base | {"min_tokens": 3, "stop_token_ids": [EOS]})
    assert (len(output["token_ids"]), output["finish_reason"]) == (4, "stop")


@BOTH_ORDERS
@pytest.mark.parametrize("length", [1, 30, 63])
def test_without_max_tokens_the_request_goes_on_to_max_model_len(
    model: Model, length: int, async_scheduling: bool
):
    with build(model, max_model_len=64, async_scheduling=async_scheduling) as llm:
        many = [{"max_tokens": None, "ignore_eos": True, "seed": n} for n in range(3)]
        penalized = {"presence_penalty": 1, "min_tokens": 1000}
        for output in sample(llm, *many, many[0] | penalized, prompt=words(length, seed=0)):
            assert len(output["token_ids"]) == 64 - length
            assert output["finish_reason"] == "length"
        (output,) = sample(llm, {"max_tokens": None, "logit_bias": {EOS: 100}, "min_tokens": 1})
        assert summary(output)[0][1:] == ("stop", None)


@pytest.mark.parametrize("penalty", [1e-5, 1e-4, 1e4, 1e5])
def test_an_extreme_repetition_penalty_keeps_to_the_allowed_tokens(llm: LLM, penalty: float):
    options = {"repetition_penalty": penalty, "allowed_token_ids": [20, 21, 22]}
    many = [seed | options | {"temperature": t} for seed in SEEDS[:3] for t in (0, 1)]
    found = tokens_of(sample(llm, *many))
    assert {*itertools.chain(*found)} <= {20, 21, 22}


def test_a_seed_of_minus_one_is_none(model: Model):
    assert SamplingParams(seed=-1).seed is None
    with build(model) as llm:
        one, two = tokens_of(sample(llm, *[{"seed": -1, "ignore_eos": True}] * 2))
    assert one != two


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_the_process_does_not_matter(llm: LLM, dtype: torch.dtype):
    many = [
        seed | {"top_k": 9, "logit_bias": {5: 2.7}, "frequency_penalty": 0.3, "logprobs": 2}
        for seed in SEEDS
    ]
    expected = sample(llm, *many)
    torch.set_default_dtype(dtype)
    try:
        found = sample(llm, *many)
    finally:
        torch.set_default_dtype(torch.float32)
    assert tokens_of(found) == tokens_of(expected)
    assert [out["logprobs"] for out in found] == [out["logprobs"] for out in expected]
