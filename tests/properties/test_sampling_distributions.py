"""What each of SamplingParams' options does to the tokens, against an account of its own."""

import itertools
import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helpers.cases import slow
from helpers.small_model import (
    PROMPT,
    VOCAB,
    Model,
    Options,
    build,
    chi_squared,
    outcomes,
    probabilities,
    sample,
    stop_tokens,
    tokens_of,
)
from nanovllm import LLM


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1},
        {"repetition_penalty": 1.7}, {"repetition_penalty": 0.4},
        {"temperature": 1.6, "min_p": 0.05, "top_k": 11, "top_p": 0.7, "repetition_penalty": 1.2},
    ],
    ids=str,
)  # fmt: skip
def test_this_account_agrees_with_transformers_processors(options: Options):
    makers = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper, "min_p": MinPLogitsWarper,
        "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
    }  # fmt: skip
    makers = {name: make for name, make in makers.items() if name in options}
    processors = LogitsProcessorList(make(options[name]) for name, make in makers.items())
    prompt, generated = [5, 6, 7, 5], [8, 9, 8]
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0)).double() * 2
    history = torch.tensor([prompt + generated] * 50)
    theirs = processors(history, logits).softmax(1)
    ours = torch.stack([probabilities(row, options, prompt, generated) for row in logits])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


FEW = [14, 13, 21, 20, 3]  # some of them in the prompt
DISTRIBUTIONS: dict[str, Options] = {
    "plain": {"max_tokens": 2},
    "cool": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "hot top_p": {"temperature": 2.0, "top_p": 0.6},
    "cool min_p": {"temperature": 0.6, "min_p": 0.08},
    "min_p then top_p": {"min_p": 0.15, "top_p": 0.75},
    "all truncations": {
        "temperature": 1.7, "min_p": 0.12, "top_k": 9, "top_p": 0.8, "max_tokens": 2,
    },
    "bias": {"logit_bias": {0: 4.0, 14: -1.5, 21: 0.5, 13: -100, 47: 3}},
    "bias and top_k": {"logit_bias": {0: 5.0, 14: -9}, "top_k": 3},
    "allowed": {"allowed_token_ids": [0, 5, 21, 47]},
    "allowed and top_p": {"allowed_token_ids": [0, 5, 14, 21, 47], "top_p": 0.7},
    "stops": {"allowed_token_ids": FEW, "stop_token_ids": [21, 3], "max_tokens": 3},
    "stops unless eos": {
        "allowed_token_ids": FEW, "stop_token_ids": [21], "max_tokens": 3, "ignore_eos": True,
    },
    "min_tokens": {
        "allowed_token_ids": FEW, "stop_token_ids": [3, 20], "max_tokens": 3, "min_tokens": 2,
        "temperature": 2.0,
    },
    "presence": {"allowed_token_ids": FEW, "max_tokens": 3, "presence_penalty": 1.3},
    "presence sought": {"allowed_token_ids": FEW, "max_tokens": 3, "presence_penalty": -2},
    "frequency": {"allowed_token_ids": FEW, "max_tokens": 3, "frequency_penalty": 1.1},
    "frequency sought": {"allowed_token_ids": FEW, "max_tokens": 3, "frequency_penalty": -0.7},
    "repetition": {"max_tokens": 2, "repetition_penalty": 1.9, "temperature": 0.7},
    "repetition sought": {"allowed_token_ids": FEW, "max_tokens": 3, "repetition_penalty": 0.5},
    "everything": {
        "allowed_token_ids": [*FEW, 9], "logit_bias": {9: 1.5, 14: -0.5}, "temperature": 1.4,
        "presence_penalty": 0.4, "frequency_penalty": 0.5, "repetition_penalty": 1.3,
        "min_p": 0.05, "top_k": 5, "top_p": 0.95, "min_tokens": 1, "stop_token_ids": [20],
        "max_tokens": 3,
    },
}  # fmt: skip


LIKE_OTHERS = (
    "cool", "hot top_p", "cool min_p", "bias and top_k", "allowed and top_p", "stops",
    "presence sought", "frequency sought", "repetition sought",
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        slow(DISTRIBUTIONS[name]) if name in LIKE_OTHERS else DISTRIBUTIONS[name]
        for name in DISTRIBUTIONS
    ],
    ids=DISTRIBUTIONS,
)
def test_tokens_are_as_likely_as_they_should_be(model: Model, llm: LLM, options: Options):
    """Of each outcome of up to three tokens there are as many as its probability says."""
    options = {"max_tokens": 1} | options
    expected = outcomes(model, PROMPT, options)
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-9)
    number = {1: 400, 2: 300, 3: 250}[options["max_tokens"]]
    outputs = sample(llm, *({"seed": seed} | options for seed in range(number)))
    found = [tuple(output["token_ids"]) for output in outputs]
    assert chi_squared(found, expected) > 1e-3
    for output in outputs:
        ends = output["token_ids"][-1] in stop_tokens(options)
        assert output["finish_reason"] == ("stop" if ends else "length")


def test_tokens_of_thousands_of_requests_are_as_likely_as_they_should_be(model: Model, llm: LLM):
    """The finest look at the noise, where nothing else is on."""
    options = {"max_tokens": 2, "ignore_eos": True}
    outputs = sample(llm, *({"seed": seed} | options for seed in range(2000)))
    expected = outcomes(model, PROMPT, options)
    assert chi_squared([tuple(output["token_ids"]) for output in outputs], expected) > 1e-3
    second = {(token,): 0.0 for token in range(VOCAB)}
    for (_, token), probability in expected.items():
        second[token,] += probability
    assert chi_squared([(output["token_ids"][1],) for output in outputs], second) > 1e-3


def test_completions_of_one_request_are_as_likely_as_they_should_be(model: Model, llm: LLM):
    (output,) = sample(llm, {"n": 300, "max_tokens": 2, "seed": 99})
    found = [tuple(completion["token_ids"]) for completion in output["outputs"]]
    expected = outcomes(model, PROMPT, {"max_tokens": 2})
    assert len(found) == 300
    assert chi_squared(found, expected) > 1e-3


def test_requests_without_a_seed_are_as_likely_as_they_should_be(model: Model):
    with build(model, max_num_seqs=1024, num_kvcache_blocks=1200, seed=3) as llm:
        found = [tuple(tokens) for tokens in tokens_of(sample(llm, *[{"max_tokens": 1}] * 800))]
    assert chi_squared(found, outcomes(model, PROMPT, {"max_tokens": 1})) > 1e-3


def test_neighbouring_tokens_and_seeds_are_independent(model: Model, llm: LLM):
    """Noise that a position or a seed shared with the next would show in the pairs."""
    uniform = {"temperature": 1e30, "allowed_token_ids": [0, 1, 2, 3]}
    outputs = sample(llm, *({"seed": seed, "max_tokens": 4} | uniform for seed in range(300)))
    rows = tokens_of(outputs)
    in_time = [pair for row in rows for pair in itertools.pairwise(row)]
    across = [pair for column in zip(*rows) for pair in itertools.pairwise(column)]
    expected = dict.fromkeys(itertools.product(range(4), repeat=2), 1 / 16)
    assert chi_squared(in_time, expected) > 1e-3 and chi_squared(across, expected) > 1e-3
