"""What the text of a completion must be, by vLLM's names."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# One of these says what the text is.
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the whole text of a completion must be: exactly one of the first five.

    It holds for a text that ended by itself; one that `max_tokens` or a stop string cuts is the
    beginning of such a text. Which keywords of JSON Schema there are: docs/structured-outputs.md.

    Attributes:
        json: a JSON document after a schema, given as a dict, as a string, or as a pydantic model;
            kept as a string. Properties come in the schema's order.
        regex: a match of the whole text, in the syntax of Rust's regex crate.
        choice: one of these strings.
        grammar: a text of a context-free grammar, in llguidance's form of Lark (`start: ...`), or
            in GBNF (`root ::= ...`).
        json_object: True: any JSON object.
        disable_fallback: taken and not read: there is one library.
        disable_any_whitespace: write JSON without any whitespace.
        disable_additional_properties: only False: the schema says it, as additionalProperties.
        whitespace_pattern: a regex for the whitespace that may stand between JSON's parts.
        structural_tag: only None.

    Raises:
        TypeError, ValueError: for what cannot work, by its name. What the library makes of a schema
            or a grammar shows when it is used.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: None = None

    def __post_init__(self) -> None:
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {value!r}")
        for name in ("json_object", "disable_any_whitespace"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        values = {name: getattr(self, name) for name in KINDS}
        given = [name for name, value in values.items() if not (value is None or value is False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs needs exactly one of {', '.join(KINDS)}, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.disable_additional_properties:
            raise ValueError(
                "disable_additional_properties=True: the schema says it, as additionalProperties"
            )
        if self.structural_tag is not None:
            raise ValueError("structural_tag is not served: give a grammar")
        is_json = given[0] in ("json", "json_object")
        if self.whitespace_pattern is not None and (self.disable_any_whitespace or not is_json):
            raise ValueError(
                "whitespace_pattern is for json and json_object, without disable_any_whitespace"
            )
        # A key of the cache of compiled grammars: nothing that can change, and no other fields.
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))


def _schema_text(schema: Any) -> str:
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    text = schema
    if not isinstance(schema, str):
        if not isinstance(schema, Mapping):
            raise TypeError(
                "json must be a JSON schema as a dict or a string, or a pydantic model, got "
                f"{reprlib.repr(schema)}"
            )
        try:
            text = json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json is not a JSON schema: {error}") from error
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json is not a JSON schema: {error}, in {reprlib.repr(text)}") from error
    if not is_object:
        raise ValueError(f"json must be a schema that is an object, got {reprlib.repr(text)}")
    return text


def _choices(choice: Any) -> tuple[str, ...]:
    if not isinstance(choice, (list, tuple)) or not all(isinstance(c, str) for c in choice):
        raise TypeError(f"choice must be a list of strings, got {reprlib.repr(choice)}")
    if not choice:
        raise ValueError("choice is empty: there is nothing to choose from")
    return tuple(dict.fromkeys(choice))
