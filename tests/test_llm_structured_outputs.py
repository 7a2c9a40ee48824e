"""Structured outputs by the demo model: whatever shares the batch, whatever happens to it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.engines import BOTH_ORDERS, assert_empty, build
from helpers.paths import DEMO
from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.engine.bad_words import spellings
from nanovllm.engine.step import LateRows, PendingStep

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "numbers": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "size", "numbers"],
    "additionalProperties": False,
}
PROMPTS = ["12 + 7 =", "Hello, who are you?", "1, 2, 3,", "What is it?", "who", "42"]


def structured(**what: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**what)


PARAMS = [
    SamplingParams(temperature=1.0, seed=1, max_tokens=90, n=2, logprobs=1,
        structured_outputs=structured(json=SCHEMA, disable_any_whitespace=True)),
    SamplingParams(temperature=0, max_tokens=30),
    SamplingParams(temperature=0.7, seed=2, max_tokens=30,
        structured_outputs=structured(regex=r"[0-9]{2}-[a-f]{3}")),
    SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.3, max_tokens=30,
        structured_outputs=structured(choice=["yes, it is", "no, it is not"])),
    SamplingParams(temperature=1.0, top_k=20, seed=4, max_tokens=30, bad_words=["42", "the"]),
    SamplingParams(temperature=1.0, seed=5, max_tokens=30, bad_words=["Hello"],
        structured_outputs=structured(choice=["it is", "it is not"])),
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with build(DEMO, num_kvcache_blocks=100) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[str]]:
    """Each request in an engine of its own."""
    pairs = zip(PROMPTS, PARAMS, strict=True)
    return [texts(llm.generate([prompt], params, use_tqdm=False)[0]) for prompt, params in pairs]


def texts(output: dict) -> list[str]:
    return [one["text"] for one in output["outputs"]]


def test_texts_are_what_they_must_be(alone: list[list[str]]):
    for text in alone[0]:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert re.fullmatch(r"[0-9]{2}-[a-f]{3}", alone[2][0])
    assert alone[3][0] in ("yes, it is", "no, it is not")
    assert alone[5][0] in ("it is", "it is not")


@BOTH_ORDERS
@pytest.mark.parametrize(
    "options",
    [{}, {"num_kvcache_blocks": 9, "max_model_len": 128}, {"max_num_batched_tokens": 16}],
    ids=["roomy", "preempted", "chunked"],
)
def test_company_changes_nothing(
    alone: list[list[str]], options: dict[str, int], async_scheduling: bool
):
    with build(DEMO, async_scheduling=async_scheduling, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [texts(output) for output in outputs] == alone
        assert {one["finish_reason"] for one in outputs[0]["outputs"]} == {"stop"}
        assert len(outputs[0]["outputs"][0]["logprobs"]) == len(outputs[0]["token_ids"])
        if "num_kvcache_blocks" in options:
            assert llm.scheduler.num_preemptions
        assert_empty(llm)


def test_a_stream_gives_the_same_text(llm: LLM, alone: list[list[str]]):
    indices = [2, 3, 5]
    found = dict.fromkeys(range(3), "")
    prompts, params = ([column[i] for i in indices] for column in (PROMPTS, PARAMS))
    for piece in llm.stream(prompts, params):
        found[piece["index"]] += piece["text"]
    assert [*found.values()] == [alone[i][0] for i in indices]


@BOTH_ORDERS
def test_only_a_bad_word_that_is_under_way_has_its_row_sampled_late(async_scheduling: bool):
    greedy = SamplingParams(temperature=0, max_tokens=12)
    with build(DEMO, async_scheduling=async_scheduling) as llm:
        (free,) = llm.generate(PROMPTS[1], greedy, use_tqdm=False)
        tokens, tokenizer = free["token_ids"], llm.tokenizer
        for place in range(3, 12):
            word = tokenizer.decode(tokens[place - 1 : place + 1])
            found = spellings([word], tokenizer)
            if tuple(tokens[place - 1 : place + 1]) in found and max(map(len, found)) == 2:
                break
        else:
            raise AssertionError("no two of its tokens are a word")
        late: list[int] = []
        sample_late = llm.model_runner.sample_late

        def spy(step: PendingStep, rows: LateRows) -> None:
            late.append(len(rows.rows))
            sample_late(step, rows)

        llm.model_runner.sample_late = spy
        params = SamplingParams(temperature=0, max_tokens=12, bad_words=[word])
        (output,) = llm.generate(PROMPTS[1], params, use_tqdm=False)
    own = output["token_ids"]
    assert own[:place] == tokens[:place] and own[place] != tokens[place]
    starts = [False, *(any(token == first for first, _ in found) for token in own)]
    assert late[: len(own)] == [int(is_under_way) for is_under_way in starts[: len(own)]]
    assert 0 < sum(late) < len(own)


def test_a_text_that_is_cut_says_so(llm: LLM, alone: list[list[str]]):
    short = SamplingParams(temperature=1.0, seed=1, max_tokens=5,
        structured_outputs=structured(json=SCHEMA, disable_any_whitespace=True))  # fmt: skip
    (output,) = llm.generate([PROMPTS[0]], short, use_tqdm=False)
    assert output["finish_reason"] == "length" and alone[0][0].startswith(output["text"])


def test_a_stop_string_ends_it_before_it_is_complete(llm: LLM, alone: list[list[str]]):
    stop = SamplingParams(temperature=1.0, seed=1, max_tokens=90, stop=['"size"'],
        structured_outputs=structured(json=SCHEMA, disable_any_whitespace=True))  # fmt: skip
    (output,) = llm.generate([PROMPTS[0]], stop, use_tqdm=False)
    assert output["text"] == alone[0][0].partition('"size"')[0]
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", '"size"')


@pytest.mark.parametrize(
    "what", [{"json": {"type": "nonsense"}}, {"regex": "(["}, {"grammar": "start: ("}], ids=str
)
def test_what_cannot_be_queues_nothing(llm: LLM, what: dict[str, Any]):
    params = [PARAMS[1], SamplingParams(structured_outputs=structured(**what))]
    with pytest.raises(ValueError, match="prompt 1: structured_outputs"):
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert llm.is_finished()


def test_an_abort_in_the_middle_harms_no_other(alone: list[list[str]]):
    with build(DEMO, num_kvcache_blocks=100) as llm:
        ids = [llm.add_request(*pair) for pair in zip(PROMPTS, PARAMS, strict=True)]
        for _ in range(6):
            llm.step()
        llm.abort(ids[0])
        llm.abort(ids[2])
        outputs = {}
        while not llm.is_finished():
            outputs |= {output["request_id"]: texts(output) for output in llm.step()}
        for index in (1, 4):
            assert outputs[ids[index]] == alone[index]
        assert_empty(llm)
