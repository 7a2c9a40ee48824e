"""What each of SamplingParams' options does to the tokens, against an account of its own."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Reference, edit_json, make_checkpoint
from test_engine import assert_empty
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.gumbel_sample import gumbel_noise

VOCAB = 48
EOS = 14  # the likeliest token after PROMPT
PROMPT = [1, 2, 3]
BOTH_ORDERS = pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
Options = dict[str, Any]  # of a SamplingParams


class Model:
    """A checkpoint with a small vocabulary and an end-of-sequence token, and its logits."""

    def __init__(self, path: Path) -> None:
        self.path = make_checkpoint(path, vocab_size=VOCAB)
        edit_json(path / "generation_config.json", eos_token_id=EOS)
        self.network = Reference(path).model

    @torch.inference_mode()
    def logits(self, sequences: list[list[int]]) -> torch.Tensor:
        """[sequences, tokens, VOCAB] float64, by transformers; all of one length."""
        return self.network(torch.tensor(sequences)).logits.double()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("sampling") / "model")


def build(model: Model, **options) -> LLM:
    settings = {"kvcache_block_size": 16, "num_kvcache_blocks": 200, "device": "cpu"}
    return LLM(model.path, **settings | options)


@pytest.fixture(scope="module")
def engine(model: Model):
    with build(model, max_num_seqs=1024, num_kvcache_blocks=1200, max_model_len=64) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM):
    """An engine for all tests, which must leave it empty."""
    yield engine
    assert_empty(engine)


def words(length: int, seed: int) -> list[int]:
    """A prompt; the shorter of two with one seed is a prefix of the longer."""
    source = random.Random(seed)
    return [source.randrange(VOCAB) for _ in range(length)]


def sample(llm: LLM, *many: Options, prompt: list[int] = PROMPT) -> list[dict]:
    params = [SamplingParams(**{"max_tokens": 12} | options) for options in many]
    return llm.generate([prompt] * len(many), params, use_tqdm=False)


def tokens_of(outputs: list[dict]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


# What the options mean, in float64 and one token at a time


def stop_tokens(options: Options) -> set[int]:
    return {*options.get("stop_token_ids", ())} | (set() if options.get("ignore_eos") else {EOS})


def edited_logits(
    logits: torch.Tensor, options: Options, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """[VOCAB] float64: logits after all that comes before the temperature."""
    x = logits.tolist()
    if "allowed_token_ids" in options:
        allowed = options["allowed_token_ids"]
        x = [value if token in allowed else -math.inf for token, value in enumerate(x)]
    if len(generated) < options.get("min_tokens", 0):
        for token in stop_tokens(options):
            x[token] = -math.inf
    for token, bias in options.get("logit_bias", {}).items():
        x[token] += min(max(bias, -100), 100)
    repetition = options.get("repetition_penalty", 1)
    for token in {*prompt, *generated}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(generated):
        x[token] -= options.get("presence_penalty", 0)
    for token in generated:
        x[token] -= options.get("frequency_penalty", 0)
    return torch.tensor(x, dtype=torch.float64)


def truncated(p: torch.Tensor, options: Options) -> torch.Tensor:
    """[VOCAB] float64 probabilities after min_p, top_k and top_p, in this order."""
    p = p.where(p >= options.get("min_p", 0) * p.max(), 0)
    if options.get("top_k", 0) > 0:
        best = sorted(range(VOCAB), key=lambda token: -p[token])
        p[best[options["top_k"] :]] = 0
    p /= p.sum()
    top_p, kept = options.get("top_p", 1), 0.0
    if top_p < 1:
        for token in sorted(range(VOCAB), key=lambda token: -p[token]):
            assert abs(kept - top_p) > 1e-5, "too close to call: choose another top_p"
            p[token], kept = p[token] if kept < top_p else 0, kept + p[token].item()
    return p / p.sum()


def probabilities(
    logits: torch.Tensor, options: Options, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """[VOCAB] float64: those of the next token."""
    x = edited_logits(logits, options, prompt, generated)
    temperature = options.get("temperature", 1)
    if temperature < 1e-5:
        best = torch.zeros_like(x)
        best[x.argmax()] = 1
        return best
    return truncated((x / temperature).softmax(0), options)


def outcomes(model: Model, prompt: list[int], options: Options) -> dict[tuple[int, ...], float]:
    """All that a request may give, and how likely each is."""
    ended: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(options["max_tokens"]):
        logits, grown = model.logits([prompt + list(path) for path in live])[:, -1], {}
        for (path, so_far), row in zip(live.items(), logits, strict=True):
            p = probabilities(row, options, prompt, list(path))
            for token in p.nonzero().flatten().tolist():
                paths = ended if token in stop_tokens(options) else grown
                paths[(*path, token)] = so_far * p[token].item()
        live = grown
    return ended | live


def chi_squared(found: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How likely it is that `found`, drawn from `expected`, is no closer to it than it is."""
    counts: dict[tuple[int, ...], int] = {}
    for path in found:
        assert path in expected, f"{path} cannot be"
        counts[path] = counts.get(path, 0) + 1
    bins, rare = [], [0.0, 0]
    for path, probability in expected.items():
        if probability * len(found) >= 5:
            bins.append([probability * len(found), counts.get(path, 0)])
        else:
            rare = [rare[0] + probability * len(found), rare[1] + counts.get(path, 0)]
    if rare[0] >= 5 or not bins:
        bins.append(rare)
    else:
        bins[-1] = [bins[-1][0] + rare[0], bins[-1][1] + rare[1]]
    assert math.isclose(sum(e for e, _ in bins), len(found), rel_tol=1e-9)
    statistic = sum((count - e) ** 2 / e for e, count in bins)
    half_freedom, half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, half).item() if len(bins) > 1 else 1.0


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


# Distributions

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


@pytest.mark.parametrize("options", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
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


# A mixture: every option at once, in one batch

SHARED = words(64, seed=1)
MIXTURE: dict[str, tuple[list[int], Options]] = {
    "plain": (SHARED[:40], {}),
    "greedy": (SHARED[:40], {"temperature": 0}),
    "greedy, no eos": (PROMPT, {"temperature": 0, "ignore_eos": True}),
    "hot": (SHARED[:1], {"temperature": 2.5, "ignore_eos": True}),
    "top_k": (SHARED[:33], {"top_k": 4, "ignore_eos": True}),
    "top_p": (PROMPT, {"top_p": 0.63, "ignore_eos": True}),
    "min_p": (words(20, seed=2), {"min_p": 0.15, "temperature": 1.5}),
    "truncated greedy": (PROMPT, {"temperature": 0, "top_k": 3, "top_p": 0.3, "min_p": 0.5}),
    "all truncations": (
        SHARED[:50], {"temperature": 3.0, "top_k": 11, "top_p": 0.92, "min_p": 0.06},
    ),
    "presence": (SHARED[:40], {"presence_penalty": 1.7, "ignore_eos": True}),
    "frequency": (words(17, seed=3), {"frequency_penalty": 0.9, "ignore_eos": True}),
    "frequency sought": (words(15, seed=3), {"frequency_penalty": -0.4, "ignore_eos": True}),
    "repetition": (SHARED[:48], {"repetition_penalty": 1.6, "ignore_eos": True}),
    "repetition sought": (SHARED[:12], {"repetition_penalty": 0.7, "ignore_eos": True}),
    "greedy repetition": (SHARED[:40], {"temperature": 0, "repetition_penalty": 1.4}),
    "greedy frequency": (
        PROMPT, {"temperature": 0, "frequency_penalty": 2, "ignore_eos": True},
    ),
    "greedy presence": (
        words(30, seed=4), {"temperature": 0, "presence_penalty": 2, "ignore_eos": True},
    ),
    "bias": (PROMPT, {"logit_bias": {0: 4.0, 14: -100, 21: 1.5}, "temperature": 1.2}),
    "greedy bias": (PROMPT, {"logit_bias": {5: 2.5, 14: -2}, "temperature": 0}),
    "allowed": (SHARED[:33], {"allowed_token_ids": [1, 5, 14, 30, 47], "ignore_eos": True}),
    "min_tokens": (
        PROMPT, {"min_tokens": 9, "stop_token_ids": [13, 21, 20, 3, 7], "temperature": 1.3},
    ),
    "greedy min_tokens": (SHARED[:30], {"min_tokens": 20, "temperature": 0}),
    "stops": (words(5, seed=5), {"stop_token_ids": [2, 3], "temperature": 2, "ignore_eos": True}),
    "to the end": (SHARED[:41], {"max_tokens": None, "ignore_eos": True, "top_k": 20}),
    "everything": (
        SHARED[:64],
        {
            "temperature": 1.4, "logit_bias": {9: 1.5, 14: -0.5}, "presence_penalty": 0.4,
            "frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_p": 0.03, "top_k": 25,
            "top_p": 0.93, "min_tokens": 12, "stop_token_ids": [20, 33], "logprobs": 2,
            "prompt_logprobs": 0, "allowed_token_ids": list(range(2, 40)),
        },
    ),
    "several": (SHARED[:35], {"n": 3, "presence_penalty": 1.0, "ignore_eos": True}),
}  # fmt: skip
SEED_OF = {name: 1000 + 17 * index for index, name in enumerate(MIXTURE)}
MAX_MODEL_LEN = 88  # 24 more than the longest prompt


def request(name: str) -> tuple[list[int], SamplingParams]:
    prompt, options = MIXTURE[name]
    return prompt, SamplingParams(**{"max_tokens": 24, "seed": SEED_OF[name]} | options)


def mixture_engine(model: Model, **options) -> LLM:
    return build(model, max_model_len=MAX_MODEL_LEN, **options)


def summary(output: dict) -> list[tuple]:
    return [(c["token_ids"], c["finish_reason"], c["stop_reason"]) for c in output["outputs"]]


def run(llm: LLM, names: list[str]) -> dict[str, list[tuple]]:
    prompts, params = map(list, zip(*map(request, names), strict=True))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_empty(llm)
    return {name: summary(output) for name, output in zip(names, outputs, strict=True)}


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[str, list[tuple]]:
    """Each request in an engine that has never seen another."""
    found = {}
    for name in MIXTURE:
        with mixture_engine(model) as llm:
            found |= run(llm, [name])
    return found


@pytest.mark.parametrize("name", MIXTURE)
def test_each_token_is_the_one_that_the_noise_picks_from_the_exact_probabilities(
    model: Model, alone: dict[str, list[tuple]], name: str
):
    """Of a whole sequence, so that counts, positions and lengths matter; greedy ones too."""
    prompt, options = MIXTURE[name]
    stops, may_end = stop_tokens(options), options.get("min_tokens", 0)
    for index, (tokens, finish_reason, stop_reason) in enumerate(alone[name]):
        rows = model.logits([prompt + tokens])[0, len(prompt) - 1 : -1]
        for place, (token, logits) in enumerate(zip(tokens, rows, strict=True)):
            before = tokens[:place]
            if options.get("temperature") == 0:
                scores = edited_logits(logits, options, prompt, before)
            else:
                seed, position = SEED_OF[name] + index, len(prompt) + place
                noise = gumbel_noise(torch.tensor(seed), torch.tensor(position), VOCAB)
                scores = probabilities(logits, options, prompt, before).log() + noise
            assert scores[token] > scores.max() - 1e-4, f"token {place}"
            assert token not in stops or (place >= may_end and place == len(tokens) - 1)
        limit = options.get("max_tokens", 24)
        limit = MAX_MODEL_LEN - len(prompt) if limit is None else limit
        if finish_reason == "length":
            assert (len(tokens), stop_reason) == (limit, None)
        else:
            assert finish_reason == "stop" and tokens[-1] in stops
            is_eos = tokens[-1] == EOS and not options.get("ignore_eos")
            assert stop_reason == (None if is_eos else tokens[-1])


def test_the_mixture_has_rows_that_end_in_every_way(alone: dict[str, list[tuple]]):
    """Or else the tests of it do not test what they say."""
    ends = {(reason, why is None) for found in alone.values() for _, reason, why in found}
    assert ends == {("length", True), ("stop", True), ("stop", False)}
    early = [found[0] for found in alone.values() if found[0][1] == "stop"]
    assert 4 <= len(early) <= len(alone) // 2
    assert any(len(tokens) > 5 for tokens, *_ in early)


WAYS = {
    "one batch": {},
    "three at once": {"max_num_seqs": 3},
    "chunked": {"max_num_batched_tokens": 13},
    "large blocks": {"kvcache_block_size": 64, "num_kvcache_blocks": 100},
}


@BOTH_ORDERS
@pytest.mark.parametrize("way", WAYS)
def test_a_mixture_gives_each_request_what_it_gets_alone(
    model: Model, alone: dict[str, list[tuple]], way: str, async_scheduling: bool
):
    with mixture_engine(model, async_scheduling=async_scheduling, **WAYS[way]) as llm:
        assert run(llm, list(MIXTURE)) == alone
        if way == "one batch":
            assert run(llm, list(MIXTURE)) == alone, "with what the cache holds of the first time"


@BOTH_ORDERS
def test_the_order_of_a_mixture_does_not_matter(
    model: Model, alone: dict[str, list[tuple]], async_scheduling: bool
):
    with mixture_engine(model, async_scheduling=async_scheduling) as llm:
        names = list(MIXTURE)
        random.Random(0).shuffle(names)
        half = len(names) // 2
        assert run(llm, names[:half]) | run(llm, names[half:]) == alone


@BOTH_ORDERS
@pytest.mark.parametrize("num_blocks", [6, 9])
def test_a_mixture_gives_the_same_when_preempted(
    model: Model, alone: dict[str, list[tuple]], num_blocks: int, async_scheduling: bool
):
    options = {"num_kvcache_blocks": num_blocks, "async_scheduling": async_scheduling}
    with mixture_engine(model, **options) as llm:
        preempted, preempt = [], llm.scheduler._preempt

        def spy(seq) -> None:
            preempted.append((seq.sampling_params, len(seq.output_token_ids)))
            preempt(seq)

        llm.scheduler._preempt = spy
        names = list(MIXTURE)
        assert run(llm, names) == alone
        assert run(llm, names[::-1]) == alone
        del llm.scheduler._preempt
    has_history = [params for params, length in preempted if length > 1]
    for what in ("penalizes", "truncates", "min_tokens")[: 3 if num_blocks == 9 else 1]:
        assert any(getattr(params, what) for params in has_history), f"none that {what}"


@BOTH_ORDERS
def test_penalties_count_each_token_once_when_preempted_again_and_again(
    model: Model, async_scheduling: bool
):
    """Sequences that all want the cache's last blocks, and penalties as large as they can be."""
    options = {"frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 1.5}
    params = [
        SamplingParams(**options, ignore_eos=True, max_tokens=40, seed=seed, temperature=seed % 2)
        for seed in range(6)
    ]
    prompts = [words(12 + index, seed=index) for index in range(6)]
    with build(model, max_model_len=64) as llm:
        expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    settings = {"num_kvcache_blocks": 6, "async_scheduling": async_scheduling}
    with build(model, max_model_len=64, **settings) as llm:
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
        assert llm.scheduler.num_preemptions >= 5
        assert_empty(llm)


@BOTH_ORDERS
def test_requests_that_join_while_others_run_get_what_they_get_alone(
    model: Model, alone: dict[str, list[tuple]], async_scheduling: bool
):
    with mixture_engine(model, async_scheduling=async_scheduling) as llm:
        found, queue, names = {}, list(MIXTURE), {}
        while queue or not llm.is_finished():
            if queue:
                name = queue.pop()
                names[llm.add_request(*request(name))] = name
            for _ in range(2):
                for output in llm.step():
                    found[names[output["request_id"]]] = summary(output)
        assert found == alone
        assert_empty(llm)


@BOTH_ORDERS
def test_an_aborted_neighbour_changes_nothing(
    model: Model, alone: dict[str, list[tuple]], async_scheduling: bool
):
    with mixture_engine(model, async_scheduling=async_scheduling) as llm:
        for steps in (1, 4):
            names = {llm.add_request(*request(name)): name for name in MIXTURE}
            outputs = [output for _ in range(steps) for output in llm.step()]
            dropped = [request_id for request_id in names if request_id % 3 == 0]
            for request_id in dropped:
                llm.abort(request_id)
            while not llm.is_finished():
                outputs += llm.step()
            found = {names[output["request_id"]]: summary(output) for output in outputs}
            kept = [name for request_id, name in names.items() if request_id not in dropped]
            assert {name: found[name] for name in kept} == {name: alone[name] for name in kept}
            assert_empty(llm)


def test_equal_seeds_give_equal_tokens_wherever_they_are(llm: LLM):
    many = [{"seed": seed % 4, "top_k": 1 + seed % 5 * 3} for seed in range(40)]
    found = tokens_of(sample(llm, *many))
    assert found[:20] == found[20:]
    assert len({tuple(tokens) for tokens in found}) > 14
    assert tokens_of(sample(llm, *many[::-1])) == found[::-1]
    assert [tokens_of(sample(llm, options))[0] for options in many[:8]] == found[:8]


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_mixture_gives_the_same_on_a_gpu(
    model: Model, alone: dict[str, list[tuple]], backend: str, enforce_eager: bool
):
    options = {"device": "cuda", "attention_backend": backend, "enforce_eager": enforce_eager}
    for num_blocks in (200, 14):
        with mixture_engine(model, num_kvcache_blocks=num_blocks, **options) as llm:
            assert run(llm, list(MIXTURE)) == alone
            assert run(llm, list(MIXTURE)[::-1]) == alone


# Values at their ends

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


# Several completions


@BOTH_ORDERS
def test_completions_differ_and_repeat(model: Model, async_scheduling: bool):
    options = {"seed": 11, "ignore_eos": True}
    with build(model, max_num_seqs=64, async_scheduling=async_scheduling) as llm:
        five, again, three, one, other = sample(
            llm, *(options | {"n": n} for n in (5, 5, 3, 1)), options | {"n": 5, "seed": 50}
        )
        assert_empty(llm)
    for output, n in ((five, 5), (three, 3), (one, 1)):
        assert [completion["index"] for completion in output["outputs"]] == list(range(n))
        first = output["outputs"][0]
        assert {key: output[key] for key in first} == first
    tokens = tokens_of(five["outputs"])
    assert len({*map(tuple, tokens)}) == 5
    assert tokens_of(again["outputs"]) == tokens
    assert tokens_of(three["outputs"]) == tokens[:3] and one["token_ids"] == tokens[0]
    assert {*map(tuple, tokens_of(other["outputs"]))}.isdisjoint(map(tuple, tokens))


def test_completions_without_a_seed_differ_and_repeat_with_the_engines(model: Model):
    found = []
    for seed in (0, 0, 1):
        with build(model, seed=seed) as llm:
            outputs = sample(llm, *[{"n": 3, "ignore_eos": True}] * 3)
            found.append([tokens for output in outputs for tokens in tokens_of(output["outputs"])])
    assert found[0] == found[1] != found[2]
    assert all(len({*map(tuple, tokens)}) == 9 for tokens in found)


def test_greedy_completions_are_equal(llm: LLM):
    (greedy,) = tokens_of(sample(llm, {"temperature": 0}))
    (output,) = sample(llm, {"temperature": 0, "n": 4})
    assert tokens_of(output["outputs"]) == [greedy] * 4


@pytest.mark.parametrize("seed", [2**64 - 2, 2**63 - 2, -2, -(2**63)])
def test_seeds_of_completions_wrap_around(llm: LLM, seed: int):
    (output,) = sample(llm, {"n": 4, "seed": seed, "ignore_eos": True})
    assert len({*map(tuple, tokens_of(output["outputs"]))}) == 4


@BOTH_ORDERS
@pytest.mark.parametrize(("length", "full"), [(40, 2), (33, 2), (32, 1), (16, 0), (1, 0)])
def test_completions_share_the_full_blocks_of_the_prompt(
    model: Model, length: int, full: int, async_scheduling: bool
):
    with build(model, async_scheduling=async_scheduling) as llm:
        params = SamplingParams(n=4, max_tokens=3, seed=0, ignore_eos=True)
        llm.add_request(words(length, seed=8), params)
        llm.step()
        assert llm.metrics()["kv_blocks_in_use"] == full + 4 * (-(-length // 16) - full)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert outputs[0]["num_cached_tokens"] == 0
        assert llm.metrics()["cached_prompt_tokens"] == 3 * 16 * full
        assert llm.stats.prefill_tokens == length + 3 * (length - 16 * full)
        assert_empty(llm)


@BOTH_ORDERS
@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"max_num_batched_tokens": 5}], ids=str)
def test_completions_are_the_same_when_few_run_at_once(
    model: Model, limits: dict, async_scheduling: bool
):
    options = {"n": 5, "seed": 3, "temperature": 1.5, "frequency_penalty": 0.5}
    found = []
    for settings in ({}, limits | {"async_scheduling": async_scheduling}):
        with build(model, **settings) as llm:
            found += map(summary, sample(llm, options, prompt=words(40, seed=1)))
            assert_empty(llm)
    assert found[0] == found[1]


def drain(llm: LLM) -> list[dict]:
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    return outputs


@BOTH_ORDERS
def test_a_request_is_given_back_when_its_last_completion_has_ended(
    model: Model, async_scheduling: bool
):
    """Here the completions end one by one, with the stop tokens."""
    options = {"n": 6, "seed": 3, "max_tokens": 40, "stop_token_ids": list(range(8))}
    with build(model, async_scheduling=async_scheduling) as llm:
        (expected,) = map(summary, sample(llm, options))
        lengths = [len(tokens) for tokens, *_ in expected]
        assert len({*lengths}) == 6, "choose another seed"
        request_id = llm.add_request(PROMPT, SamplingParams(**options))
        steps = 1
        while not (outputs := llm.step()):
            steps += 1
        assert steps == max(lengths) + async_scheduling
        (output,) = outputs + drain(llm)
        assert output["request_id"] == request_id and summary(output) == expected
        metrics = output["metrics"]
        assert metrics["arrival_time"] <= metrics["first_token_time"] <= metrics["finished_time"]
        assert llm.metrics()["requests_finished"] == 2
        assert llm.metrics()["generated_tokens"] == 2 * sum(lengths)
        assert_empty(llm)


@BOTH_ORDERS
def test_a_request_whose_completions_end_together_is_given_back_once(
    model: Model, async_scheduling: bool
):
    with build(model, async_scheduling=async_scheduling) as llm:
        params = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
        ids = [llm.add_request(PROMPT, params) for _ in range(2)]
        assert [output["request_id"] for output in drain(llm)] == ids
        assert llm.metrics()["requests_finished"] == 2


@BOTH_ORDERS
def test_abort_drops_all_completions_wherever_they_are(model: Model, async_scheduling: bool):
    params = SamplingParams(
        n=6, seed=21, max_tokens=40, stop_token_ids=[0, 1, 2], ignore_eos=True, presence_penalty=0.1
    )
    other = SamplingParams(n=2, seed=1, max_tokens=12, ignore_eos=True)
    with build(model, max_num_seqs=5, async_scheduling=async_scheduling) as llm:
        (expected,) = map(summary, llm.generate([words(40, seed=2)], other, use_tqdm=False))
        for round_, steps in enumerate((0, 1, 2, 3, 6, 9, 14, 20), 1):
            dropped = llm.add_request(words(40, seed=3), params)
            kept = llm.add_request(words(40, seed=2), other)
            outputs = [output for _ in range(steps) for output in llm.step()]
            assert dropped not in [output["request_id"] for output in outputs]
            llm.abort(dropped)
            llm.abort(dropped)
            left = [*llm.scheduler.running, *llm.scheduler.waiting]
            assert {seq.seq_id for seq in left} <= {kept, kept + 1}
            outputs += drain(llm)
            assert {o["request_id"]: summary(o) for o in outputs} == {kept: expected}
            assert llm.metrics()["requests_aborted"] == round_
            assert_empty(llm)


def test_only_the_id_of_the_request_aborts_it(llm: LLM):
    request_id = llm.add_request(PROMPT, SamplingParams(n=3, max_tokens=3))
    for unknown in (request_id + 1, request_id + 2, request_id + 3):
        llm.abort(unknown)
    assert len(llm.scheduler.waiting) == 3
    llm.abort(request_id)
    assert_empty(llm)


def test_stream_refuses_several_completions(llm: LLM):
    with pytest.raises(ValueError, match="n must be 1"):
        llm.stream(PROMPT, SamplingParams(n=2))


# Refusals

NAN, INF = math.nan, math.inf
BAD_PARAMS = [
    ("top_k", [-2, -(2**70)], [1.0, "5", None, True, [5], NAN]),
    ("top_p", [0, 0.0, -0.1, 1.0001, NAN, INF, -INF, 10**400], ["1", None, True, [1]]),
    ("min_p", [-1e-9, 1.0001, NAN, INF, -INF], ["0", None, False, np.bool_(True)]),
    ("min_tokens", [-1, 65], [1.0, None, True, "1"]),
    ("max_tokens", [0, -1], [1.0, "1", False]),
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
    ("seed", [2**64, -(2**63) - 1], [1.0, "1", True]),
    ("temperature", [-1e-9, NAN, INF, 10**400], [None, "1", True]),
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


def test_min_tokens_may_be_max_tokens_and_no_more():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=1000, max_tokens=None).max_tokens is None
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens \(5\), got 6"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_params_cannot_be_changed_afterwards_and_copy_what_they_are_given():
    stops, bias = [5, 6], {5: 1.0}
    params = SamplingParams(stop_token_ids=stops, allowed_token_ids=stops, logit_bias=bias)
    stops.append(-1)
    bias[-1] = NAN
    assert params == SamplingParams(
        stop_token_ids=[5, 6], allowed_token_ids=(5, 6), logit_bias={5: 1}
    )
    with pytest.raises(AttributeError):
        params.top_k = 3


BAD_FOR_THE_MODEL: dict[str, tuple[Options, str]] = {
    "stop beyond": ({"stop_token_ids": [3, VOCAB]}, r"stop_token_ids has token id 48, outside"),
    "stop below": ({"stop_token_ids": [-1]}, r"stop_token_ids has token id -1, outside"),
    "allowed beyond": ({"allowed_token_ids": [VOCAB]}, r"allowed_token_ids has token id 48, out"),
    "allowed below": ({"allowed_token_ids": [0, -48]}, r"allowed_token_ids has token id -48, out"),
    "allowed huge": ({"allowed_token_ids": [2**70]}, r"allowed_token_ids has token id 11805"),
    "bias beyond": ({"logit_bias": {3: 1, VOCAB: 0}}, r"logit_bias has token id 48, outside"),
    "bias below": ({"logit_bias": {-1: 1.0}}, r"logit_bias has token id -1, outside"),
    "stop string": ({"stop": "t5"}, r"stop needs text, and .* has no tokenizer: use stop_token_id"),
    "logprobs": ({"logprobs": VOCAB + 1}, r"logprobs must be at most the vocabulary of 48, got 49"),
    "prompt_logprobs": ({"prompt_logprobs": 2**70}, r"prompt_logprobs must be at most the vocabu"),
    "only eos": ({"allowed_token_ids": [EOS], "min_tokens": 1}, r"min_tokens leaves no token"),
    "only stops": (
        {"allowed_token_ids": [5, 6], "stop_token_ids": [6, 5, 4], "min_tokens": 1},
        r"min_tokens leaves no token to sample: .* allowed_token_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"), BAD_FOR_THE_MODEL.values(), ids=BAD_FOR_THE_MODEL
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_by_name_with_nothing_queued(
    llm: LLM, options: Options, message: str
):
    bad, good = SamplingParams(**options), SamplingParams(max_tokens=2)
    for call in (
        lambda: llm.generate(PROMPT, bad, use_tqdm=False),
        lambda: llm.generate([PROMPT] * 3, [good, bad, good], use_tqdm=False),
        lambda: llm.generate([PROMPT] * 3, [good, good, bad], use_tqdm=False),
        lambda: llm.add_request(PROMPT, bad),
        lambda: llm.stream([PROMPT] * 2, [good, bad]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert_empty(llm)


def test_a_refused_request_draws_no_seed(model: Model):
    """What comes after it is what would have come without it."""
    found = []
    for bad in ((), ({"logit_bias": {VOCAB: 1.0}},)):
        with build(model) as llm:
            for options in bad:
                with pytest.raises(ValueError, match="logit_bias"):
                    sample(llm, {}, options)
            found.append(tokens_of(sample(llm, {"ignore_eos": True})))
    assert found[0] == found[1]


def test_stop_tokens_that_the_model_has_are_fine(llm: LLM):
    (output,) = sample(llm, {"stop_token_ids": [0, VOCAB - 1], "max_tokens": 1})
    assert len(output["token_ids"]) == 1


def test_min_tokens_with_a_vocabulary_of_stop_tokens_is_refused(llm: LLM):
    with pytest.raises(ValueError, match="min_tokens leaves no token"):
        sample(llm, {"stop_token_ids": list(range(VOCAB)), "min_tokens": 2})
