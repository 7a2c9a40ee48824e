"""Random JSON schemas that can be satisfied."""

import random
from typing import Any

WORDS = ["id", "name", "größe", "名前", "a b", 'say "so"', "x\\y", "🙂", "list", "v"]
PATTERNS = ["^[a-z]{2,5}$", "^(yes|no)$", "^[0-9]{3}-[0-9]{2}$", "^é+$", "^日[本語]*$"]


def random_document_schema(seed: int) -> dict[str, Any]:
    """Nested at most four deep; what `_reference` refers to is at its root."""
    rng = random.Random(seed)
    node = {
        "type": "object", "required": ["value"], "additionalProperties": False,
        "properties": {"value": _integer(rng, 0), "next": {"$ref": "#/$defs/node"}},
    }  # fmt: skip
    return {**random_schema(rng, 3), "$defs": {"node": node, "part": random_schema(rng, 0)}}


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_integer, _number, _string, _enum, _simple, _pattern]
    inner = [_object, _object, _array, _any_of, _all_of, _reference]
    return rng.choice(leaves + inner * 2 if depth else leaves)(rng, depth - 1)


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1200, 900)
    high = low + rng.choice([0, 1, 7, 40, 999])
    bounds = rng.choice([
        {}, {"minimum": low}, {"maximum": high}, {"minimum": low, "maximum": high},
        {"exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1},
    ])  # fmt: skip
    return {"type": "integer", **bounds}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-400, 400) / rng.choice([1, 4, 10, 100])
    bounds = rng.choice(
        [{}, {"minimum": low}, {"maximum": low}, {"minimum": low, "maximum": low + 3}]
    )
    return {"type": "number", **bounds}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 5)
    bounds = rng.choice([
        {}, {"minLength": low}, {"maxLength": low}, {"minLength": low, "maxLength": low + 3},
    ])  # fmt: skip
    return {"type": "string", **bounds}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values = [*WORDS, 0, -7, 1.5, None, True, [1, "a"], {"k": [None]}]
    return rng.choice(
        [{"enum": rng.sample(values, rng.randint(1, 5))}, {"const": rng.choice(values)}]
    )


def _simple(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    others = rng.choice([False, False, {"type": "integer"}, None])
    if others is not None:
        schema["additionalProperties"] = others
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    bounds = rng.choice([
        {}, {"minItems": low}, {"maxItems": low + 1}, {"minItems": low, "maxItems": low + 1},
    ])  # fmt: skip
    if rng.random() < 0.2:
        first = [random_schema(rng, depth) for _ in range(2)]
        return {
            "type": "array",
            "prefixItems": first,
            "items": False,
            "minItems": rng.randint(0, 2),
        }
    return {"type": "array", "items": random_schema(rng, depth), **bounds}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"oneOf": [_integer(rng, 0), _string(rng, 0), {"type": "null"}]}
    return {"anyOf": [random_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def _all_of(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        low = rng.randint(-50, 50)
        return {
            "allOf": [{"type": "integer", "minimum": low}, {"maximum": low + rng.randint(0, 30)}]
        }
    parts = [{"properties": {n: _enum(rng, 0)}, "required": [n]} for n in rng.sample(WORDS, 2)]
    return {"type": "object", "allOf": parts}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    """To a definition that may refer to itself, or to one that does not."""
    return {"$ref": rng.choice(["#/$defs/node", "#/$defs/part"])}
