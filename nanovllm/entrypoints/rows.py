"""A row of a data set: the prompt and the sampling parameters that it asks for."""

import hashlib
import json
from dataclasses import fields, replace
from typing import Any

from nanovllm import LLM, SamplingParams

PROMPT_TYPES = {"prompt": str, "prompt_token_ids": list, "messages": list}
TEMPLATE_TYPES = {"tools": list, "chat_template_kwargs": dict}
JSON_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))
ROW_KEYS = ("id", *PROMPT_TYPES, *TEMPLATE_TYPES, "sampling_params", *SAMPLING_KEYS)


class RowParser:
    """Makes requests of rows.

    Args:
        llm: the engine, for its chat template.
        params: what a row does not set.
        template_kwargs: more arguments for the chat template.
        seed: what the seeds of rows without one are computed from.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, template_kwargs: dict[str, Any], seed: int
    ) -> None:
        self.llm = llm
        self.params = params
        self.template_kwargs = template_kwargs
        self.seed = seed

    def parse(self, row: dict[str, Any], name: object) -> tuple[str | list[int], SamplingParams]:
        """The prompt and the sampling parameters of a row.

        Args:
            row: has one of `prompt`, `prompt_token_ids` and `messages`; maybe `tools` and
                `chat_template_kwargs` for the chat template, and `sampling_params`, a dict, or its
                entries as keys of the row's own. Other keys do not matter. None is not given.
            name: tells the row from others; its seed depends on it.

        Raises:
            TypeError, ValueError: if the row is invalid.
        """
        keys = [key for key in PROMPT_TYPES if row.get(key) is not None]
        if len(keys) != 1:
            found = " and ".join(keys) or "none"
            raise ValueError(f"it needs one of {', '.join(PROMPT_TYPES)}, and has {found}")
        (key,) = keys
        prompt = _checked(key, row[key], PROMPT_TYPES[key])
        template = {
            option: _checked(option, row[option], expected)
            for option, expected in TEMPLATE_TYPES.items()
            if row.get(option) is not None
        }
        if key == "messages":
            kwargs = self.template_kwargs | template.pop("chat_template_kwargs", {})
            prompt = self.llm.chat_prompt(prompt, chat_template_kwargs=kwargs, **template)
        elif template:
            raise ValueError(f"{' and '.join(template)} needs messages, and it has {key}")
        return prompt, self._params(row, name)

    def _params(self, row: dict[str, Any], name: object) -> SamplingParams:
        """Those given in a row, and `params` for the rest."""
        options = {key: row[key] for key in SAMPLING_KEYS if row.get(key) is not None}
        given = row.get("sampling_params")
        for key, value in _checked("sampling_params", {} if given is None else given, dict).items():
            if key not in SAMPLING_KEYS:
                takes = ", ".join(SAMPLING_KEYS)
                raise ValueError(f"sampling_params has {key!r}; it takes {takes}")
            if key in options:
                raise ValueError(f"{key} is given twice: in sampling_params, and beside it")
            options[key] = value
        if isinstance(options.get("logit_bias"), dict):  # its keys are strings, as always in JSON
            bias = options["logit_bias"].items()
            options["logit_bias"] = {
                int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in bias
            }
        if options.get("seed") in (None, -1):
            options["seed"] = row_seed(self.seed, name)
        params = replace(self.params, **options)
        if params.n != 1 or params.logprobs is not None or params.prompt_logprobs is not None:
            raise ValueError(
                "n, logprobs and prompt_logprobs have no place in the output: repeat the prompt "
                "for more answers, or use LLM.generate"
            )
        return params


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: if it is none, or has an `id` that JSON has no value for.
    """
    try:
        item = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(item, dict):
        raise ValueError('not a JSON object, such as {"prompt": "Hello"}')
    try:
        json.dumps(item.get("id"), allow_nan=False)
    except ValueError:
        raise ValueError("id must be a JSON value, and has nan or an infinite number") from None
    return item


def unknown_keys(row: dict[str, Any]) -> list[str]:
    """The keys of a row that `RowParser.parse` does not read."""
    return [key for key in row if key not in ROW_KEYS]


def row_seed(seed: int, name: object) -> int:
    """The seed of a row that gives none. It is the same in every run."""
    digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def reason(error: Exception) -> str:
    """Why a row gets no answer. The engine counts prompts, and was given one at a time."""
    text = str(error)
    return "the prompt" + text.removeprefix("prompt 0") if text.startswith("prompt 0") else text


def _checked(key: str, value: Any, expected: type) -> Any:
    if not isinstance(value, expected):
        raise TypeError(f"{key} must be {JSON_NAMES[expected]}, got {_shortened(value)}")
    return value


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
