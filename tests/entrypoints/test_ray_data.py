"""Ray Data: rows and their answers, and actors that die."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

import pyarrow as pa
import ray

from helpers.paths import DEMO
from helpers.ray_data import (
    ENGINE,
    FaultyPredictor,
    LLMPredictor,
    local_ray,
    number_prompts,
    predictor,
)
from nanovllm import SamplingParams
from nanovllm.entrypoints.ray_data import generate, replica_arguments

QUESTION = [{"role": "user", "content": "47+38="}]
GREEDY = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture(scope="module")
def ours() -> Iterator[LLMPredictor]:
    """A predictor in this process."""
    made = predictor()
    yield made
    made.llm.close()


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    with local_ray():
        yield


def test_every_kind_of_row(ours: LLMPredictor):
    token_ids = ours.llm.chat_prompt(QUESTION)
    greedy = {"temperature": 0.0, "max_tokens": 30}
    rows = [
        {"prompt": ours.llm.tokenizer.decode(token_ids), "sampling_params": greedy},
        {"prompt_token_ids": token_ids, "sampling_params": greedy},
        {"messages": QUESTION, "sampling_params": greedy},
        {"messages": QUESTION, "sampling_params": greedy | {"stop": [" 85"]}},
    ]
    batch = pa.Table.from_pylist(
        [{"kept": {"any": i}} | dict.fromkeys(["prompt", "prompt_token_ids", "messages"]) | row
         for i, row in enumerate(rows)]
    )  # fmt: skip
    answers = ours(batch)
    assert answers.select(batch.column_names) == batch
    assert answers["text"].to_pylist() == ["47 + 38 = 85"] * 3 + ["47 + 38 ="]
    (expected,) = ours.llm.generate([token_ids], GREEDY, use_tqdm=False)
    assert answers["token_ids"].to_pylist()[:3] == [expected["token_ids"]] * 3
    assert answers["finish_reason"].to_pylist() == ["stop"] * 4
    assert answers["error"].null_count == 4
    assert answers.schema.field("token_ids").type == pa.list_(pa.int32())


def test_json_text_in_place_of_structs(ours: LLMPredictor):
    params = json.dumps({"temperature": 0, "max_tokens": None, "logit_bias": {"5": -100}})
    batch = pa.table({"messages": [json.dumps(QUESTION)], "sampling_params": [params]})
    (answer,) = ours(batch).to_pylist()
    assert (answer["text"], answer["finish_reason"]) == ("47 + 38 = 85", "stop")


def test_content_parts_and_tools_of_rows(ours: LLMPredictor, monkeypatch: pytest.MonkeyPatch):
    template = (
        "{{ messages[0].content if messages[0].content is string }}{{ color }}"
        "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    )
    monkeypatch.setattr(ours.llm.tokenizer, "chat_template", template)
    parts = [{"type": "text", "text": "47"}, {"type": "text", "text": "38"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    image = [{"type": "image_url", "text": None, "image_url": {"url": "a.png"}}]
    rows = [
        {"messages": [{"role": "user", "content": parts}], "tools": tools},
        {"messages": [{"role": "user", "content": parts}], "chat_template_kwargs": {"color": "!"}},
        {"messages": [{"role": "user", "content": image}]},
    ]
    (first, _), (second, _) = map(ours.request, rows[:2])
    assert ours.llm.tokenizer.decode(first) == "47\n38<add>"
    assert ours.llm.tokenizer.decode(second) == "47\n38!"
    text = {"tools": json.dumps(tools)}
    assert ours.request(rows[0] | text)[0] == first
    with pytest.raises(ValueError, match=r"messages\[0\], part 0 has the type 'image_url'"):
        ours.request(rows[2])


def test_a_bad_row_keeps_its_error_and_the_others_go_on(ours: LLMPredictor):
    rows = [
        {"prompt": "1, 2, 3", "sampling_params": None},
        {"prompt": None, "sampling_params": None},
        {"prompt": "", "sampling_params": None},
        {"prompt": "a", "sampling_params": '{"top_p": 2}'},
        {"prompt": "a", "sampling_params": '{"temp": 2}'},
        {"prompt": "a", "sampling_params": "{"},
        {"prompt": "a", "sampling_params": '{"n": 2}'},
        {"prompt": "1, " * 100, "sampling_params": None},
        {"prompt": "1, 2, 3", "sampling_params": '{"max_tokens": 1}'},
    ]
    answers = ours(pa.Table.from_pylist(rows)).to_pylist()
    reasons = [
        None, "it needs one of prompt", "the prompt is empty", "top_p must be", "has 'temp'",
        "sampling_params is text, and not JSON", "no place in the output", "and at most 63 fit",
        None,
    ]  # fmt: skip
    for answer, expected in zip(answers, reasons, strict=True):
        if expected is None:
            assert answer["error"] is None
            assert answer["text"] and answer["token_ids"] and answer["finish_reason"]
        else:
            assert expected in answer["error"]
            assert answer["text"] is answer["token_ids"] is answer["finish_reason"] is None


def test_a_row_has_the_same_tokens_in_any_batch(ours: LLMPredictor):
    batch = pa.Table.from_pylist(number_prompts(40))
    expected = ours(batch)["token_ids"].to_pylist()
    pieces = [ours(batch.slice(start, 7))["token_ids"].to_pylist() for start in range(0, 40, 7)]
    assert [tokens for piece in reversed(pieces) for tokens in piece] != expected
    assert [tokens for piece in pieces for tokens in piece] == expected


def test_ids_give_equal_prompts_different_seeds(ours: LLMPredictor):
    prompts = {"prompt": ["1, 2, 3"] * 2, "sampling_params": ['{"temperature": 3}'] * 2}
    first, second = ours(pa.table(prompts))["token_ids"].to_pylist()
    assert first == second
    named = pa.table(prompts | {"id": ["a", "b"]})
    first, second = ours(named)["token_ids"].to_pylist()
    assert first != second
    other = predictor(sampling_params={"temperature": 1.0, "seed": 1})
    with other.llm:
        assert other(named)["token_ids"].to_pylist()[0] != first


def test_batches_that_cannot_be_answered(ours: LLMPredictor):
    with pytest.raises(TypeError, match='give map_batches batch_format="pyarrow"'):
        ours({"prompt": ["a"]})
    with pytest.raises(ValueError, match="a column 'text', which answers would replace"):
        ours(pa.table({"prompt": ["a"], "text": ["b"]}))


def test_an_engine_that_fails_here_raises(tmp_path: Path):
    faulty = FaultyPredictor(str(DEMO), faults=["engine"], journal=tmp_path, **ENGINE)
    batch = pa.Table.from_pylist(number_prompts(3))
    with faulty.llm:
        faulty(batch)
        with pytest.raises(RuntimeError, match="the engine has failed"):
            faulty(batch)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (0, {}, 0), (8, {}, 1), (8, {"tensor_parallel_size": 4}, 4), (8, {"device": "cpu"}, 0),
        (0, {"tensor_parallel_size": 4}, 0),
    ],
)  # fmt: skip
def test_gpus_of_a_replica(
    gpus: int, options: dict, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    arguments = replica_arguments(3, 100, options)
    assert (arguments["num_gpus"], arguments["num_cpus"]) == (expected, 0)
    assert (arguments["compute"].min_size, arguments["compute"].max_size) == (3, 3)


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_when_actors_die(
    local: None, ours: LLMPredictor, tmp_path: Path
):
    rows, faults = number_prompts(2000), ["killed", "engine"]
    answers = ray.data.from_items(rows, override_num_blocks=20).map_batches(
        FaultyPredictor,
        fn_constructor_args=(str(DEMO), {"temperature": 1.0}),
        fn_constructor_kwargs=ENGINE | {"faults": faults, "journal": tmp_path},
        **replica_arguments(2, 100, ENGINE),
    )
    found = sorted(answers.take_all(), key=lambda row: row["id"])
    assert all((tmp_path / fault).exists() for fault in faults)
    assert len(list(tmp_path.glob("process-*"))) == 4  # two, and one in place of each dead one
    assert [row["id"] for row in found] == [*range(2000)]
    expected = ours(pa.Table.from_pylist(rows)).to_pylist()
    assert [[*row["token_ids"]] for row in found] == [row["token_ids"] for row in expected]
    assert [row["text"] for row in found] == [row["text"] for row in expected]


@pytest.mark.slow
def test_a_block_that_fails_in_a_fresh_engine_too_ends_the_run(local: None, tmp_path: Path):
    answers = ray.data.from_items(number_prompts(300), override_num_blocks=3).map_batches(
        FaultyPredictor,
        fn_constructor_args=(str(DEMO),),
        fn_constructor_kwargs=ENGINE | {"faults": None, "journal": tmp_path},
        **replica_arguments(1, 100, ENGINE),
    )
    with pytest.raises(ray.exceptions.RayError, match="this block fails in every engine"):
        answers.take_all()
    assert len(list(tmp_path.glob("process-*"))) == 2


def test_generate_makes_the_whole_call(local: None, ours: LLMPredictor):
    rows = number_prompts(20)
    dataset = ray.data.from_items(rows)
    answers = generate(dataset, str(DEMO), {"temperature": 1.0}, replicas=1, batch_size=8, **ENGINE)
    texts = {row["id"]: row["text"] for row in answers.take_all()}
    expected = ours(pa.Table.from_pylist(rows)).to_pylist()
    assert texts == {row["id"]: row["text"] for row in expected}
