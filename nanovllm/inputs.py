"""Prompts as dicts, by vLLM's names: `TokensPrompt(prompt_token_ids=[1, 2])`."""

from typing import TypedDict


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
