"""Every sampling option at once, in one batch: no request may change another."""

import random

import pytest

from helpers.cases import in_turns
from helpers.engines import BOTH_ORDERS, ORDERS, assert_empty
from helpers.noise import noise_of_tokens
from helpers.small_model import (
    EOS,
    PROMPT,
    VOCAB,
    Model,
    Options,
    build,
    edited_logits,
    probabilities,
    sample,
    stop_tokens,
    summary,
    tokens_of,
    words,
)
from nanovllm import LLM, SamplingParams
from nanovllm.engine.input_processor import nth_seed

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
                seed, position = nth_seed(SEED_OF[name], index), len(prompt) + place
                noise = noise_of_tokens(seed, position, VOCAB)
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


@in_turns("way, async_scheduling", {way: way for way in WAYS}, ORDERS, share=2)
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


@in_turns("num_blocks, async_scheduling", {"6": 6, "9": 9}, ORDERS, share=2)
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
