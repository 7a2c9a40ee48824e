"""StructuredOutputsParams: what they refuse, each by its name."""

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pydantic
import pytest

import nanovllm.sampling_params
from nanovllm import SamplingParams, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.mark.parametrize(
    "what",
    [
        {"json": SCHEMA}, {"json": json.dumps(SCHEMA)}, {"json": Person}, {"json": {}},
        {"regex": "a+"}, {"regex": ""}, {"choice": ["a", "b"]}, {"choice": ("a",)},
        {"grammar": 'start: "a"'}, {"json_object": True, "regex": None},
        {"regex": "a", "json_object": False, "disable_fallback": True},
        {"json": {}, "disable_any_whitespace": True}, {"json": {}, "whitespace_pattern": " ?"},
    ],
    ids=str,
)  # fmt: skip
def test_one_of_them_is_taken(what: dict[str, Any]):
    structure = StructuredOutputsParams(**what)
    assert SamplingParams(structured_outputs=what).structured_outputs == structure
    assert hash(structure) == hash(replace(structure))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json_object": False}, "got none"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json_object": True, "choice": ["a"]}, "got choice and json_object"),
        ({"json": "{"}, "json is not a JSON schema"), ({"json": ""}, "json is not a JSON schema"),
        ({"json": "true"}, "schema that is an object"), ({"json": "[]"}, "an object"),
        ({"json": {"const": float("nan")}}, "json is not a JSON schema"),
        ({"json": {"const": {1, 2}}}, "json is not a JSON schema"),
        ({"choice": []}, "choice is empty"),
        ({"json": {}, "disable_additional_properties": True}, "additionalProperties"),
        ({"regex": "a", "structural_tag": "{}"}, "structural_tag is not served"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern is for json"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pat"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(what: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**what)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json", 5), ("json", [SCHEMA]), ("json", int), ("json", Person(name="a", age=1)),
        ("regex", 5), ("regex", b"a"), ("grammar", ["a"]), ("choice", "ab"), ("choice", ["a", 5]),
        ("choice", {"a", "b"}), ("json_object", 1), ("json_object", "yes"),
    ],
)  # fmt: skip
def test_other_types_are_refused_by_name(name: str, value: object):
    with pytest.raises(TypeError, match=f"{name} must be"):
        StructuredOutputsParams(**{name: value})


def test_a_schema_in_every_form_is_the_same():
    forms = (Person, Person.model_json_schema(), json.dumps(Person.model_json_schema()))
    assert len({StructuredOutputsParams(json=form) for form in forms}) == 1
    assert StructuredOutputsParams(choice=["a", "b", "a"]).choice == ("a", "b")


def test_nothing_changes_later():
    schema = {"enum": [1]}
    structure = StructuredOutputsParams(json=schema)
    schema["enum"].append(2)
    assert json.loads(str(structure.json)) == {"enum": [1]}
    with pytest.raises(FrozenInstanceError):
        structure.regex = "a"


@pytest.mark.parametrize("options", [{"min_tokens": 1}, {"ignore_eos": True}], ids=str)
def test_an_ended_structure_cannot_go_on(options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(options))} with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, **options)


def test_names_that_scripts_import():
    assert nanovllm.sampling_params.StructuredOutputsParams is StructuredOutputsParams
    with pytest.raises(ImportError, match="use StructuredOutputsParams"):
        from nanovllm import GuidedDecodingParams  # noqa: F401


def test_a_schema_that_is_nested_too_deep_is_refused():
    text = '{"items":' * 3000 + "{}" + "}" * 3000
    with pytest.raises(ValueError, match="json is not a JSON schema"):
        StructuredOutputsParams(json=text)
