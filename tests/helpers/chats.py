"""Conversations for the demo, and what its template makes of them."""

from pathlib import Path
from typing import Any

from helpers.engines import build
from nanovllm import LLM, SamplingParams

ANSWER = SamplingParams(temperature=0, max_tokens=40)
SUM = [{"role": "user", "content": "47+38="}]
CONVERSATIONS = [
    SUM,
    [{"role": "user", "content": "从3数到9。"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
    [*SUM, {"role": "assistant", "content": "47 + 38 = 85"}, {"role": "user", "content": "20+22="}],
]
# Shows all that a template may be told.
SHOWING = (
    "{% for message in messages %}[{{ message.role }}:{{ message.content }}]{% endfor %}"
    "{% if tools %}{% for tool in tools %}<{{ tool.function.name }}>{% endfor %}{% endif %}"
    "{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}"
    "{% if documents_at is defined %}{{ documents_at | join('+') }}{% endif %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def build_demo(path: Path) -> LLM:
    return build(path, num_kvcache_blocks=128, dtype="float32")  # room for all its positions


def templated(llm: LLM, messages: list[Any], **options: Any) -> str:
    defaults = {"add_generation_prompt": True, "tokenize": False}
    return llm.tokenizer.apply_chat_template(messages, **defaults | options)


def shown(llm: LLM, messages: list[Any], **options: Any) -> str:
    """What the model is to read, as text."""
    return llm.tokenizer.decode(llm.chat_prompt(messages, **options), skip_special_tokens=False)


def same(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two runs of the same prompts have in common."""
    keys = ("text", "token_ids", "finish_reason", "stop_reason", "prompt_token_ids", "logprobs")
    return [{key: output[key] for key in keys} for output in outputs]
