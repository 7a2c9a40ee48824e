"""The parameters that a checkpoint recommends."""

from pathlib import Path
from typing import Any

import pytest

from helpers.chats import SUM, build_demo
from helpers.checkpoints import edit_json
from helpers.engines import GREEDY, build
from nanovllm import SamplingParams


def recommended(path: Path, **content: Any) -> SamplingParams:
    edit_json(path / "generation_config.json", **content)
    with build(path) as llm:
        return llm.get_default_sampling_params()


def test_recommended_params_are_those_of_generation_config(tiny_copy: Path):
    found = recommended(
        tiny_copy, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.05,
        repetition_penalty=1.05, max_new_tokens=321,
    )  # fmt: skip
    assert found == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.05, max_tokens=321
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"temperature": 0.6}, {"temperature": 0.6}), ({"top_k": 7}, {"top_k": 7}),
        ({"top_p": 0.5}, {"top_p": 0.5}), ({"min_p": 0.5}, {"min_p": 0.5}),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2}),
        ({"max_new_tokens": 3}, {"max_tokens": 3}),
        ({"temperature": None, "top_k": None, "max_new_tokens": None}, {}),
        ({"temperature": 0, "top_k": 0, "min_p": 0}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 7}, {"top_k": 7}), ({"do_sample": None}, {}),
        ({"n": 5, "stop": "x", "seed": 3, "max_tokens": 9, "num_beams": 4, "x": {}}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_recommended_is_the_default(
    tiny_copy: Path, content: dict[str, Any], expected: dict[str, Any]
):
    assert recommended(tiny_copy, **content) == SamplingParams(**expected)


def test_without_the_file_recommended_params_are_the_defaults(tiny_copy: Path):
    (tiny_copy / "generation_config.json").unlink(missing_ok=True)
    with build(tiny_copy) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("content", "error", "name"),
    [
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"top_p": 0}, ValueError, "top_p"), ({"top_p": 1.5}, ValueError, "top_p"),
        ({"top_k": -2}, ValueError, "top_k"), ({"top_k": 2.5}, TypeError, "top_k"),
        ({"min_p": 2}, ValueError, "min_p"), ({"min_p": []}, TypeError, "min_p"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty"),
        ({"max_new_tokens": 0}, ValueError, "max_tokens"),
        ({"max_new_tokens": "9"}, TypeError, "max_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_recommended_values_that_cannot_work_are_refused_when_asked_for(
    tiny_copy: Path, content: dict[str, Any], error: type, name: str
):
    edit_json(tiny_copy / "generation_config.json", **content)
    with build(tiny_copy) as llm:
        (output,) = llm.generate([1, 2], GREEDY, use_tqdm=False)  # which does not need them
        assert len(output["token_ids"]) == 12
        with pytest.raises(error, match=name):
            llm.get_default_sampling_params()


def test_recommended_params_can_be_used_as_they_are(demo_copy: Path) -> None:
    edit_json(demo_copy / "generation_config.json", temperature=0.1, top_k=5, max_new_tokens=30)
    with build_demo(demo_copy) as llm:
        params = llm.get_default_sampling_params()
        (output,) = llm.chat(SUM, params, use_tqdm=False)
        assert output["text"] == "47 + 38 = 85"
