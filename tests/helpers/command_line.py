"""Shared by the tests of `python -m nanovllm`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from nanovllm import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "demo" / "tiny-qwen3")
INTRODUCTION = "I am a tiny demo model of nanovllm, with about one million parameters."
COMMAND = (sys.executable, "-m", "nanovllm")
ENGINE_OPTIONS = ("--device", "cpu", "--dtype", "float32")


class RecordingLLM(LLM):
    """An engine with small blocks that records how it was used."""

    options: ClassVar[dict[str, Any]] = {}  # more engine options, which a test may set
    engines: ClassVar[list["RecordingLLM"]] = []  # all that were built

    def __init__(self, model: str, **options: Any) -> None:
        small = {"kvcache_block_size": 16, "num_kvcache_blocks": 256}
        super().__init__(model, **small | self.options | options)
        self.conversations: list[list[tuple[str, str]]] = []
        self.template_kwargs: list[dict[str, Any]] = []
        self.streamed: list[tuple[list[int], SamplingParams]] = []
        self.most_queued = 0
        self.engines.append(self)

    def chat_prompt(self, messages: Any, **options: Any) -> list[int]:
        self.template_kwargs.append(options["chat_template_kwargs"])
        token_ids = super().chat_prompt(messages, **options)
        self.conversations.append([(m["role"], m["content"]) for m in messages])
        return token_ids

    def stream(self, prompts: Any, params: Any = None) -> Iterator[Any]:
        self.streamed.append((prompts[0], params))
        return super().stream(prompts, params)

    def step(self) -> list[Any]:
        self.most_queued = max(self.most_queued, self.scheduler.num_unfinished)
        return super().step()
