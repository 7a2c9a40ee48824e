"""Bad requests are refused with a message, the engine none the worse."""

import math
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from helpers.checkpoints import VOCAB_SIZE, Reference, random_tokens
from helpers.engines import BOTH_ORDERS, assert_empty, build
from helpers.small_model import EOS, PROMPT, VOCAB, Model, Options, sample, tokens_of
from helpers.small_model import build as build_small
from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TWENTY = SamplingParams(temperature=0, max_tokens=20)
GOOD = random_tokens(20, seed=1)


@pytest.fixture(scope="module")
def engine(tiny: Path):
    with build(tiny, max_model_len=64) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, tiny_reference: Reference):
    """An engine that, after the test, has nothing queued and gives a good request its tokens."""
    yield engine
    assert engine.is_finished(), "a refused request was queued"
    (output,) = engine.generate(GOOD, GREEDY, use_tqdm=False)
    assert output["token_ids"] == tiny_reference.tokens(GOOD, 8)
    manager = engine.scheduler.block_manager
    assert manager.num_free_blocks == len(manager.blocks)


@pytest.fixture
def small(small_engine: LLM):
    """An engine of a vocabulary of 48 and no tokenizer, which tests must leave empty."""
    yield small_engine
    assert_empty(small_engine)


# Prompts


def test_any_mapping_may_stand_for_what_it_holds(llm: LLM):
    prompt = MappingProxyType({"prompt_token_ids": GOOD})
    tokens = [llm.generate(form, GREEDY, use_tqdm=False) for form in (prompt, [prompt], GOOD)]
    assert len({tuple(output["token_ids"]) for (output,) in tokens}) == 1


class Column:
    """As tables have them: neither a list nor a tuple."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> object:
        return self.values[index]


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[1, 2, 3], [4, 5, 6]]), [np.array([1, 2, 3]), np.array([4, 5, 6])],
        torch.tensor([[1, 2, 3], [4, 5, 6]]), np.array(["t1 t2 t3", "t4 t5 t6"]),
        np.array(["t1 t2 t3", "t4 t5 t6"], dtype=object), Column("t1 t2 t3", [4, 5, 6]),
        [{"prompt": "t9", "prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": np.arange(4, 7)}],
        [{"prompt": "t1 t2 t3", "prompt_token_ids": None}, {"prompt": "t4 t5 t6", "extra": None}],
    ],
    ids=["array", "arrays", "tensor", "strings", "objects", "column", "both", "None"],
)  # fmt: skip
def test_any_sequence_is_a_list_of_prompts(llm: LLM, prompts: object):
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[1, 2, 3], [4, 5, 6]]


def test_one_array_of_tokens_is_one_prompt(llm: LLM):
    (output,) = llm.generate(np.array([1, 2, 3]), GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == [1, 2, 3]
    assert {type(token) for token in output.prompt_token_ids} == {int}


def test_no_prompts_give_no_outputs(llm: LLM):
    for nothing in ([], (), np.empty(0)):
        assert llm.generate(nothing, GREEDY, use_tqdm=False) == []
        assert list(llm.stream(nothing, GREEDY)) == []


BAD_PROMPTS = {
    "empty string": ("", ValueError, "prompt 0 is empty"),
    "empty token list": ([[]], ValueError, "prompt 0 is empty"),
    "token beyond the vocabulary": ([1, VOCAB_SIZE], ValueError, "token id 128, outside"),
    "negative token": ([1, -1, 2], ValueError, "token id -1, outside"),
    "huge token": ([2**70], ValueError, "outside the vocabulary"),
    "bool token": ([1, True], TypeError, "token 1 must be an integer, got True"),
    "bool first": ([True, 1], TypeError, "token 0 must be an integer, got True"),
    "float token": ([1, 2.0], TypeError, r"token 1 must be an integer, got 2\.0"),
    "nan token": ([math.nan], TypeError, "must be an integer, got nan"),
    "None token": ([None], TypeError, "must be an integer, got None"),
    "string among tokens": ([1, "t1"], TypeError, "token 1 must be an integer, got 't1'"),
    "list among tokens": ([1, [2]], TypeError, r"token 1 must be an integer, got \[2\]"),
    "token among prompts": (["t1", 2], TypeError, "prompt 1 must be a string or a list"),
    "None among prompts": (["t1", None], TypeError, "prompt 1 must be a string or a list"),
    "nested too deep": ([[[1]]], TypeError, r"token 0 must be an integer, got \[1\]"),
    "None": (None, TypeError, "prompts must be a string, a list"),
    "integer": (7, TypeError, "prompts must be a string, a list"),
    "bytes": (b"t1", TypeError, "prompts must be a string, a list"),
    "dict of nothing": ({"prompt": None}, ValueError, "prompt 0 must have a"),
    "dict of more": ({"prompt": "t1", "multi_modal_data": 5}, ValueError, "and nothing else"),
    "dict of neither": ([{"text": "t1"}], ValueError, "prompt 0 must have a string as 'prompt'"),
    "dict of another type": ([{"prompt": [1]}], ValueError, "prompt 0 must have a string as"),
    "float array": (np.ones(3), TypeError, r"token 0 must be an integer, got 1\.0"),
    "as long as max_model_len": (random_tokens(64), ValueError, "has 64 tokens, and at most 63"),
    "longer than max_model_len": (random_tokens(99), ValueError, "has 99 tokens, and at most 63"),
    "long string": (" ".join(["t1"] * 64), ValueError, "has 64 tokens, and at most 63"),
}


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompt_is_refused(llm: LLM, prompt: object, error: type, message: str):
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", ValueError), ([], ValueError), ([-1], ValueError), ([VOCAB_SIZE], ValueError),
        ([1.5], TypeError), ([True], TypeError), (None, TypeError), (3, TypeError),
        (random_tokens(64), ValueError),
    ],
)  # fmt: skip
def test_bad_prompt_is_refused_by_add_request(llm: LLM, prompt: object, error: type):
    with pytest.raises(error):
        llm.add_request(prompt, GREEDY)


def test_one_bad_prompt_among_many_queues_nothing(llm: LLM):
    for bad in ([], [VOCAB_SIZE], random_tokens(64)):
        for place in range(3):
            prompts = [GOOD, GOOD]
            prompts.insert(place, bad)
            with pytest.raises(ValueError, match=f"prompt {place} "):
                llm.generate(prompts, GREEDY, use_tqdm=False)
            assert llm.is_finished()


def test_lone_surrogate_is_refused_by_the_number_of_its_prompt(llm: LLM):
    with pytest.raises(ValueError, match="prompt 1 is not valid Unicode"):
        llm.generate(["t1", "t1 \ud800"], GREEDY, use_tqdm=False)


def test_tokenizer_that_fails_on_a_prompt_queues_nothing(llm: LLM, monkeypatch):
    class Broken:
        def encode(self, text: str) -> list[int]:
            raise KeyError(text)

    monkeypatch.setattr(llm.input_processor, "tokenizer", Broken())
    with pytest.raises(KeyError):
        llm.generate([[1], "t1"], GREEDY, use_tqdm=False)
    assert_empty(llm)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (True, TypeError, "must be an integer, got True"),
        (False, TypeError, "must be an integer, got False"),
        (VOCAB_SIZE, ValueError, "token id 128, outside"),
    ],
)
def test_one_bad_token_among_good_zeros_and_ones_is_found(
    llm: LLM, place: int, bad: object, error: type, message: str
):
    prompts: list[list[object]] = [[0, 1, 5, 1], [1, 7, 0, 0], [9]]
    prompts[1][place] = bad
    named = f"prompt 1, token {place}" if error is TypeError else "prompt 1 has"
    with pytest.raises(error, match=f"{named} {message}"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


def test_text_of_numpy_comes_back_as_a_string(llm: LLM):
    (output,) = llm.generate([np.str_("t1 t2")], GREEDY, use_tqdm=False)
    assert type(output["prompt"]) is str


def test_numpy_integers_are_tokens(llm: LLM, tiny_reference: Reference):
    (output,) = llm.generate([np.int64(token) for token in GOOD], GREEDY, use_tqdm=False)
    assert output["token_ids"] == tiny_reference.tokens(GOOD, 8)
    assert {type(token) for token in output["prompt_token_ids"]} == {int}


# The room for a prompt and its answer


@BOTH_ORDERS
def test_prompt_one_short_of_max_model_len_gets_one_token(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    prompt = random_tokens(63, seed=6)
    with build(tiny, max_model_len=64, async_scheduling=async_scheduling) as llm:
        (output,) = llm.generate(prompt, TWENTY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(prompt, 1)
        assert output["finish_reason"] == "length"


def test_output_stops_at_max_model_len(tiny: Path, tiny_reference: Reference):
    prompt = random_tokens(50, seed=6)
    with build(tiny, max_model_len=64) as llm:
        (output,) = llm.generate(prompt, TWENTY, use_tqdm=False)
        assert output["token_ids"] == tiny_reference.tokens(prompt, 20)[:14]
        assert output["finish_reason"] == "length"


# Parameters


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lists_of_unequal_length_are_refused(llm: LLM, count: int):
    with pytest.raises(ValueError, match=f"2 prompts need as many sampling_params.*got {count}"):
        llm.generate([GOOD, GOOD], [GREEDY] * count, use_tqdm=False)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 0.5, [GREEDY, {}]])
def test_params_of_another_type_are_refused(llm: LLM, params: object):
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams"):
        llm.generate([GOOD, GOOD], params, use_tqdm=False)


def test_extreme_but_possible_params_work(llm: LLM):
    params = [
        SamplingParams(temperature=1e30, max_tokens=4),
        SamplingParams(temperature=1e-30, max_tokens=4),
        SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(4), seed=np.int32(3)),
        SamplingParams(max_tokens=2**80, seed=2**64 - 1),
        SamplingParams(max_tokens=4, seed=-(2**63)),
    ]
    outputs = llm.generate([GOOD] * 5, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [4, 4, 4, 44, 4]


@pytest.mark.filterwarnings("error")
def test_temperature_beyond_float32_is_no_warning(llm: LLM):
    """A finite number by SamplingParams' own rule, too large for the device's float32."""
    params = SamplingParams(temperature=1e300, max_tokens=4, seed=1)
    (output,) = llm.generate([GOOD], params, use_tqdm=False)
    assert len(output["token_ids"]) == 4


# Parameters, against the model

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
    "prompt_logprobs": ({"prompt_logprobs": 2**70}, r"prompt_logprobs (must be at|do not come)"),
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
    small: LLM, options: Options, message: str
):
    bad, good = SamplingParams(**options), SamplingParams(max_tokens=2)
    for call in (
        lambda: small.generate(PROMPT, bad, use_tqdm=False),
        lambda: small.generate([PROMPT] * 3, [good, bad, good], use_tqdm=False),
        lambda: small.generate([PROMPT] * 3, [good, good, bad], use_tqdm=False),
        lambda: small.add_request(PROMPT, bad),
        lambda: small.stream([PROMPT] * 2, [good, bad]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert_empty(small)


def test_stop_tokens_that_the_model_has_are_fine(small: LLM):
    (output,) = sample(small, {"stop_token_ids": [0, VOCAB - 1], "max_tokens": 1})
    assert len(output["token_ids"]) == 1


def test_min_tokens_with_a_vocabulary_of_stop_tokens_is_refused(small: LLM):
    with pytest.raises(ValueError, match="min_tokens leaves no token"):
        sample(small, {"stop_token_ids": list(range(VOCAB)), "min_tokens": 2})


def test_a_refusal_says_which_prompt_it_is_about(small: LLM):
    params = [SamplingParams()] * 2 + [SamplingParams(stop_token_ids=[VOCAB])]
    with pytest.raises(ValueError, match=r"^prompt 2: stop_token_ids has token id 48"):
        small.generate([PROMPT] * 3, params, use_tqdm=False)


def test_a_refused_request_draws_no_seed(model: Model):
    """What comes after it is what would have come without it."""
    found = []
    for bad in ((), ({"logit_bias": {VOCAB: 1.0}},)):
        with build_small(model) as llm:
            for options in bad:
                with pytest.raises(ValueError, match="logit_bias"):
                    sample(llm, {}, options)
            found.append(tokens_of(sample(llm, {"ignore_eos": True})))
    assert found[0] == found[1]


def test_a_refused_stream_draws_no_seed(model: Model):
    found = []
    for bad in ((), ({"n": 2}, {"prompt_logprobs": 1})):
        with build_small(model) as llm:
            for options in bad:
                with pytest.raises(ValueError, match=next(iter(options))):
                    llm.stream([PROMPT] * 2, [SamplingParams(), SamplingParams(**options)])
            found.append(tokens_of(sample(llm, {"ignore_eos": True})))
    assert found[0] == found[1]
