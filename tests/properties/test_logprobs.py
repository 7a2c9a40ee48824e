"""Log probabilities are transformers', whatever else happens to a request or to its batch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.cases import in_turns
from helpers.checkpoints import VOCAB_SIZE, Reference, edit_json, random_tokens
from helpers.engines import BOTH_ORDERS, ORDERS, assert_empty, build
from nanovllm import LLM, SamplingParams

Request = tuple[list[int], dict[str, Any]]  # a prompt, and options of a SamplingParams
MAX_TOKENS = 20


@pytest.fixture
def llm(tiny: Path):
    with build(tiny) as engine:
        yield engine
        assert_empty(engine)


def run(llm: LLM, requests: list[Request]) -> list[dict]:
    params = [SamplingParams(**{"max_tokens": MAX_TOKENS} | options) for _, options in requests]
    return llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)


@dataclass
class Row:
    """What comes after some tokens: log probabilities in float64, and who is how likely."""

    logprobs: list[float]
    order: list[int]  # the most likely token first
    ranks: list[int]


class Expected:
    """Transformers' log probabilities, each computed once."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._known: dict[tuple[int, ...], list[Row]] = {}

    def rows(self, tokens: list[int]) -> list[Row]:
        """Row i is of the token after the first i + 1."""
        key = tuple(tokens)
        if key not in self._known:
            logprobs = self.logprobs(tokens)
            orders = logprobs.argsort(dim=1, descending=True)
            ranks = orders.argsort(dim=1) + 1
            columns = (logprobs.tolist(), orders.tolist(), ranks.tolist())
            self._known[key] = [Row(*row) for row in zip(*columns, strict=True)]
        return self._known[key]

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] float64."""
        return self.reference.model(torch.tensor([tokens])).logits[0].double().log_softmax(1)


@pytest.fixture(scope="module")
def expected(tiny_reference: Reference) -> Expected:
    return Expected(tiny_reference)


def check_entry(entry: dict, token: int, k: int, row: Row) -> None:
    """Of one position: what is said of its token and of the `k` most likely ones."""
    assert list(entry) == [token, *(best for best in row.order[:k] if best != token)]
    for candidate, found in entry.items():
        assert type(found.logprob) is float and type(found.rank) is int
        assert abs(found.logprob - row.logprobs[candidate]) < 1e-4
        assert found.rank == row.ranks[candidate]
        assert found.decoded_token == f"t{candidate}"


def check(expected: Expected, request: Request, output: dict) -> None:
    """All that an output says of probabilities, against transformers."""
    prompt, options = request
    k, prompt_k = options.get("logprobs"), options.get("prompt_logprobs")
    assert len(output["outputs"]) == options.get("n", 1)
    for completion in output["outputs"]:
        tokens = completion["token_ids"]
        rows = expected.rows(prompt + tokens)
        if k is None:
            assert completion["logprobs"] is completion["cumulative_logprob"] is None
        else:
            own = rows[len(prompt) - 1 : -1]
            for entry, token, row in zip(completion["logprobs"], tokens, own, strict=True):
                check_entry(entry, token, k, row)
            total = sum(row.logprobs[token] for row, token in zip(own, tokens, strict=True))
            assert abs(completion["cumulative_logprob"] - total) < 1e-4 * len(tokens)
    if prompt_k is None:
        assert output["prompt_logprobs"] is None
    else:
        first, *rest = output["prompt_logprobs"]
        assert first is None
        for entry, token, row in zip(rest, prompt[1:], rows[: len(prompt) - 1], strict=True):
            check_entry(entry, token, prompt_k, row)


def check_all(llm: LLM, expected: Expected, requests: list[Request]) -> list[dict]:
    outputs = run(llm, requests)
    for request, output in zip(requests, outputs, strict=True):
        check(expected, request, output)
    assert_empty(llm)
    return outputs


# Prompts of one token, around the blocks of 16, with a common prefix; every kind of row
REQUESTS: list[Request] = [
    (random_tokens(1, seed=1), {"temperature": 0, "logprobs": 3, "prompt_logprobs": 3}),
    (random_tokens(2, seed=1), {"seed": 1, "prompt_logprobs": 0}),
    (random_tokens(15, seed=2), {"seed": 2, "logprobs": 0, "prompt_logprobs": 2}),
    (random_tokens(16, seed=2), {"temperature": 0, "logprobs": 0}),
    (random_tokens(17, seed=2), {"seed": 3, "logprobs": VOCAB_SIZE, "prompt_logprobs": VOCAB_SIZE}),
    (random_tokens(33, seed=2), {"temperature": 0}),
    (random_tokens(33, seed=2), {"temperature": 0, "prompt_logprobs": 1}),
    (random_tokens(33, seed=2), {"seed": 4, "logprobs": 5, "prompt_logprobs": 5}),
    (random_tokens(32, seed=2), {"seed": 5}),
    (random_tokens(48, seed=2), {"seed": 6, "logprobs": 1, "temperature": 2.0}),
    (random_tokens(48, seed=2), {"seed": 7, "logprobs": 2, "prompt_logprobs": 0, "n": 3}),
    (
        random_tokens(40, seed=3),
        {
            "seed": 8, "logprobs": 4, "prompt_logprobs": 1, "temperature": 0.4, "top_k": 9,
            "top_p": 0.9, "min_p": 0.05, "presence_penalty": 1.5, "frequency_penalty": 0.3,
            "repetition_penalty": 1.4, "logit_bias": {3: 5.0, 60: -100},
            "allowed_token_ids": list(range(64)), "min_tokens": 3, "stop_token_ids": [5, 6],
        },
    ),
    (random_tokens(20, seed=4), {"temperature": 0, "logprobs": 2, "repetition_penalty": 2.0}),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokens_without(tiny: Path) -> list[list[list[int]]]:
    """What the requests generate, each alone, if nobody asks for log probabilities."""
    found = []
    for prompt, options in REQUESTS:
        with build(tiny) as llm:
            plain = options | {"logprobs": None, "prompt_logprobs": None}
            found.append(tokens(run(llm, [(prompt, plain)])[0]))
    return found


def tokens(output: dict) -> list[list[int]]:
    return [completion["token_ids"] for completion in output["outputs"]]


WAYS = {
    "one batch": {},
    "chunked": {"max_num_batched_tokens": 7},
    "one token at a time": {"max_num_batched_tokens": 1},
    "two at once": {"max_num_seqs": 2},
    "large blocks": {"kvcache_block_size": 256, "num_kvcache_blocks": 20},
    "preempted": {"num_kvcache_blocks": 6, "max_model_len": 80},
    "preempted and chunked": {
        "num_kvcache_blocks": 6, "max_model_len": 80, "max_num_batched_tokens": 11,
    },
}  # fmt: skip


@in_turns("way, async_scheduling", {way: way for way in WAYS}, ORDERS, share=2)
def test_log_probabilities_are_transformers_and_change_no_token(
    tiny: Path,
    expected: Expected,
    tokens_without: list[list[list[int]]],
    way: str,
    async_scheduling: bool,
):
    with build(tiny, async_scheduling=async_scheduling, **WAYS[way]) as llm:
        first = check_all(llm, expected, REQUESTS)
        again = check_all(llm, expected, REQUESTS[::-1])[::-1]
        assert list(map(tokens, first)) == list(map(tokens, again)) == tokens_without
        if way.startswith("preempted"):
            assert llm.scheduler.num_preemptions > 3, "the test does not test what it says"


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_log_probabilities_are_transformers_on_a_gpu(
    tiny: Path,
    expected: Expected,
    tokens_without: list[list[list[int]]],
    backend: str,
    enforce_eager: bool,
):
    options = {"device": "cuda", "attention_backend": backend, "enforce_eager": enforce_eager}
    for way in ("one batch", "chunked", "preempted"):
        with build(tiny, **WAYS[way], **options) as llm:
            for _ in range(2):
                outputs = check_all(llm, expected, REQUESTS)
                assert list(map(tokens, outputs)) == tokens_without


@pytest.mark.parametrize("temperature", [0, 1.0, 3.0])
@pytest.mark.parametrize("k", [0, 1, 2, VOCAB_SIZE - 1, VOCAB_SIZE])
def test_any_number_of_tokens_may_be_asked_for(
    llm: LLM, expected: Expected, k: int, temperature: float
):
    options = {"logprobs": k, "prompt_logprobs": k, "temperature": temperature, "seed": 5}
    (output,) = check_all(llm, expected, [(random_tokens(20, seed=6), options)])
    for entry in output["logprobs"] + output["prompt_logprobs"][1:]:
        assert max(1, k) <= len(entry) <= min(k + 1, VOCAB_SIZE)
        if k == VOCAB_SIZE:
            assert sum(math.exp(found.logprob) for found in entry.values()) == pytest.approx(1)
    if temperature == 3:
        outside = [next(iter(entry.values())).rank > k for entry in output["logprobs"]]
        assert any(outside) == (k < VOCAB_SIZE - 1), "the test does not test what it says"


def test_log_probabilities_are_those_before_all_changes(llm: LLM, expected: Expected):
    """Also of a token that would never have come without them."""
    prompt = random_tokens(10, seed=7)
    for options in (
        {"temperature": 1e30}, {"temperature": 1e-5}, {"logit_bias": {9: 100}},
        {"allowed_token_ids": [9]}, {"presence_penalty": 2, "frequency_penalty": 2},
        {"repetition_penalty": 5.0}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9},
        {"min_tokens": MAX_TOKENS, "stop_token_ids": [t for t in range(VOCAB_SIZE) if t != 9]},
    ):  # fmt: skip
        request = prompt, options | {"logprobs": 5, "prompt_logprobs": 1, "seed": 1}
        (output,) = check_all(llm, expected, [request])
        if 9 in output["token_ids"]:
            assert output["token_ids"] == [9] * MAX_TOKENS
            assert output["cumulative_logprob"] < -20


@BOTH_ORDERS
@pytest.mark.parametrize("length", [128, 129, 130, 257, 300])
def test_long_prompts(tiny: Path, expected: Expected, length: int, async_scheduling: bool):
    """Several at once, whose logits are not computed all together."""
    requests = [
        (random_tokens(length, seed=1), {"prompt_logprobs": 1, "max_tokens": 2, "logprobs": 1}),
        (random_tokens(9, seed=2), {"max_tokens": 3}),
        (random_tokens(length - 3, seed=3), {"prompt_logprobs": 0, "max_tokens": 1}),
    ]
    for budget in (16384, 150):
        with build(
            tiny, num_kvcache_blocks=60, max_num_batched_tokens=budget,
            async_scheduling=async_scheduling,
        ) as llm:  # fmt: skip
            check_all(llm, expected, requests)


@BOTH_ORDERS
@pytest.mark.parametrize("length", [16, 17, 48, 50])
def test_a_prompt_that_is_wholly_cached_gets_all_its_log_probabilities(
    tiny: Path, expected: Expected, length: int, async_scheduling: bool
):
    prompt = random_tokens(length, seed=8)
    plain = {"temperature": 0, "max_tokens": 4}
    cacheable = (length - 1) // 16 * 16
    with build(tiny, async_scheduling=async_scheduling) as llm:
        run(llm, [(prompt, plain)])
        requests = [
            (prompt, plain),
            (prompt, plain | {"prompt_logprobs": 2}),
            (prompt, plain | {"logprobs": 2}),
            (prompt, plain | {"prompt_logprobs": 0, "n": 2}),
        ]
        outputs = check_all(llm, expected, requests)
        cached = [output["num_cached_tokens"] for output in outputs]
        assert cached == [cacheable, 0, cacheable, 0]
        assert len({tuple(output["token_ids"]) for output in outputs}) == 1
        outputs = check_all(llm, expected, requests[::-1])
        assert [output["num_cached_tokens"] for output in outputs[::-1]] == cached


def test_a_prompt_run_for_its_log_probabilities_fills_the_cache(llm: LLM, expected: Expected):
    prompt = random_tokens(50, seed=9)
    check_all(llm, expected, [(prompt, {"prompt_logprobs": 1})])
    (output,) = check_all(llm, expected, [(prompt, {"logprobs": 1, "temperature": 0})])
    assert output["num_cached_tokens"] == 48


@BOTH_ORDERS
def test_one_token_in_and_one_out(tiny: Path, expected: Expected, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for options in ({}, {"temperature": 0}, {"n": 2}):
            request = [5], options | {"max_tokens": 1, "logprobs": 1, "prompt_logprobs": 1}
            (output,) = check_all(llm, expected, [request])
            assert output["prompt_logprobs"] == [None]


def test_each_completion_has_its_own_and_the_prompts_come_once(llm: LLM, expected: Expected):
    options = {"n": 4, "seed": 3, "logprobs": 2, "prompt_logprobs": 2, "temperature": 2.0}
    (output,) = check_all(llm, expected, [(random_tokens(40, seed=4), options)])
    totals = [completion["cumulative_logprob"] for completion in output["outputs"]]
    assert len({*totals}) == 4
    assert output["cumulative_logprob"] == totals[0]
    assert output["logprobs"] == output["outputs"][0]["logprobs"]
    assert all("prompt_logprobs" not in completion for completion in output["outputs"])


@BOTH_ORDERS
def test_a_request_that_ends_early_has_as_many_as_it_has_tokens(
    tiny: Path, tiny_copy: Path, expected: Expected, async_scheduling: bool
):
    """Also where the step after the last token was under way already, or text was cut off."""
    prompt = random_tokens(20, seed=10)
    greedy = expected.reference.tokens(prompt, MAX_TOKENS)
    end = greedy.index(greedy[5]) + 1
    edit_json(tiny_copy / "generation_config.json", eos_token_id=greedy[5])
    options = {"temperature": 0, "logprobs": 1, "prompt_logprobs": 0}
    company = (random_tokens(30, seed=11), options | {"ignore_eos": True})
    with build(tiny_copy, async_scheduling=async_scheduling) as llm:
        output, _ = check_all(llm, expected, [(prompt, options), company])
        assert output["token_ids"] == greedy[:end]
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for why in ({"stop_token_ids": [greedy[5]]}, {"stop": f"t{greedy[5]}"}):
            output, _ = check_all(llm, expected, [(prompt, options | why), company])
            assert output["token_ids"] == greedy[:end]
            assert output["finish_reason"] == "stop"


@BOTH_ORDERS
def test_what_a_request_asks_for_is_no_neighbours(
    tiny: Path, expected: Expected, async_scheduling: bool
):
    """Plain rows beside the others get none, and the same tokens."""
    prompts = [random_tokens(10 + index, seed=index) for index in range(6)]
    plain = [(prompt, {"seed": index, "temperature": index % 2}) for index, prompt in
             enumerate(prompts)]  # fmt: skip
    with build(tiny, async_scheduling=async_scheduling) as llm:
        alone = [output["token_ids"] for output in check_all(llm, expected, plain)]
        for asked in range(6):
            mixed = list(plain)
            mixed[asked] = prompts[asked], plain[asked][1] | {"logprobs": 2, "prompt_logprobs": 1}
            outputs = check_all(llm, expected, mixed)
            assert [output["token_ids"] for output in outputs] == alone


@BOTH_ORDERS
def test_an_aborted_request_leaves_its_neighbours_their_own(
    tiny: Path, expected: Expected, async_scheduling: bool
):
    with build(tiny, max_num_batched_tokens=25, async_scheduling=async_scheduling) as llm:
        for steps in range(7):
            ids = [
                llm.add_request(prompt, SamplingParams(max_tokens=MAX_TOKENS, **options))
                for prompt, options in REQUESTS[4:9]
            ]
            outputs = [output for _ in range(steps) for output in llm.step()]
            llm.abort(ids[0])
            llm.abort(ids[3])
            while not llm.is_finished():
                outputs += llm.step()
            found = {ids.index(output["request_id"]): output for output in outputs}
            assert sorted(found) == [1, 2, 4]
            for index, output in found.items():
                check(expected, REQUESTS[4 + index], output)
            assert_empty(llm)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_they_are_still_probabilities(tiny: Path, expected: Expected, dtype: str):
    """Close to transformers' in float32, and adding up to 1 as exactly as there."""
    prompt = random_tokens(30, seed=5)
    with build(tiny, dtype=dtype) as llm:
        options = {"logprobs": VOCAB_SIZE, "prompt_logprobs": VOCAB_SIZE, "seed": 0}
        (output,) = run(llm, [(prompt, options)])
    entries = output["prompt_logprobs"][1:] + output["logprobs"]
    rows = expected.logprobs(prompt + output["token_ids"])
    for entry, row in zip(entries, rows, strict=False):
        found = torch.tensor([entry[token].logprob for token in range(VOCAB_SIZE)])
        assert found.double().exp().sum().item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(found.double(), row, rtol=0, atol=0.3)


@pytest.fixture
def tied(tiny_copy: Path) -> Path:
    """A checkpoint whose tokens come in pairs, 2i and 2i + 1, that are equally likely."""
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    path.unlink()  # a link to the shared file
    tensors["lm_head.weight"][1::2] = tensors["lm_head.weight"][::2]
    save_file(tensors, path)
    return tiny_copy


def test_of_equally_likely_tokens_the_lower_comes_first(tied: Path):
    with build(tied) as llm:
        (output,) = run(llm, [([1, 2, 3], {"logprobs": 0, "prompt_logprobs": 0, "seed": 1})])
    for entry in output["logprobs"] + output["prompt_logprobs"][1:]:
        ((token_id, found),) = entry.items()
        assert found.rank % 2 == 1 - token_id % 2


def test_the_most_likely_tokens_have_their_places_as_ranks(tied: Path):
    with build(tied) as llm:
        (output,) = run(llm, [([1, 2, 3], {"logprobs": VOCAB_SIZE, "seed": 1})])
    for token_id, entry in zip(output["token_ids"], output["logprobs"]):
        ranks = [found.rank for token, found in entry.items() if token != token_id]
        assert ranks == sorted({*ranks}) and len(ranks) == VOCAB_SIZE - 1
