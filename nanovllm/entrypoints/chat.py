"""`python -m nanovllm chat`: a conversation in a terminal."""

import argparse
import secrets
import sys
from contextlib import closing, suppress
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.common import (
    SAMPLING_OPTIONS,
    CommandError,
    HeldInterrupt,
    given_options,
    load,
    params_of,
    say,
    thinking_kwargs,
)

HELP = """\
Talk with a model in the terminal. What is said stays in the conversation, until

  /reset    forgets it
  /exit     ends the chat; so does the end of input (Ctrl-D)
  Ctrl-C    stops the answer that is coming, or ends the chat where none is
"""
EXAMPLE = """\
example:
  python -m nanovllm chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --temperature 0.6
"""


class Chat:
    """A conversation, and the terminal that it is had in.

    Args:
        llm: the engine; its prefix cache holds what was said, so that a turn computes what is new.
        params: how answers are sampled.
        system: what the conversation opens with, if anything.
        template_kwargs: for the chat template.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, template_kwargs: dict[str, Any]
    ) -> None:
        self.llm = llm
        self.params = params
        self.template_kwargs = template_kwargs
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.history = list(self.opening)

    def run(self) -> None:
        """Read and answer until the end of input, /exit, or Ctrl-C where no answer is coming."""
        try:
            while True:
                message = input("> " if sys.stdin.isatty() else "")
                command = message.strip()
                if command == "/exit":
                    return
                if command == "/reset":
                    self.history = list(self.opening)
                    say("The conversation is forgotten.")
                elif command:
                    self.answer(message)
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()  # the shell's prompt begins on a line of its own

    def answer(self, message: str) -> None:
        """Print the answer to a message as it comes, and remember both, unless that cannot work."""
        history = [*self.history, {"role": "user", "content": message}]
        try:
            prompt = self.prompt(history)
            room = self.llm.config.max_model_len - len(prompt)
            if room < 1:
                say(
                    f"The conversation with this message has {len(prompt)} tokens, and at most "
                    f"{self.llm.config.max_model_len - 1} fit: it was left out. /reset forgets the "
                    "conversation; or say it in fewer words, or start with a larger --max-model-len"
                    " if the model allows."
                )
                return
            pieces = self.llm.stream([prompt], self.params)
        except (TypeError, ValueError) as error:
            say(f"This message cannot be answered, and was left out: {error}")
            return
        answer, num_tokens, reason = "", 0, None
        with HeldInterrupt() as interrupt, closing(pieces):
            try:
                for piece in pieces:
                    answer += piece["text"]
                    num_tokens += len(piece["token_ids"])
                    reason = piece["finish_reason"]
                    print(piece["text"], end="", flush=True)
                    if interrupt.seen:
                        break
            except KeyboardInterrupt:
                pass
        print(flush=True)
        self.history = [*history, {"role": "assistant", "content": answer}]
        if reason is None:
            say("[stopped; what was said stays in the conversation]")
        elif reason == "length" and num_tokens == room:
            say("[the conversation is full: /reset forgets it]")
        elif reason == "length":
            say("[cut at --max-tokens]")

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation that an answer is to follow."""
        return self.llm.chat_prompt(messages, chat_template_kwargs=self.template_kwargs)


def chat(args: argparse.Namespace) -> int:
    """The command `chat`."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  lets input() edit lines, and remember them
    options = {"max_tokens": None} | given_options(args, SAMPLING_OPTIONS)
    try:
        # Another chat, other answers; and in small blocks, of which a turn finds more in the cache.
        with load(args, seed=secrets.randbits(31), kvcache_block_size=64) as llm:
            params = params_of(llm, options)
            session = Chat(llm, params, args.system, thinking_kwargs(args))
            try:
                session.prompt([*session.opening, {"role": "user", "content": "Hello"}])
            except ValueError as error:
                raise CommandError(f"no chat with this model: {error}") from error
            say(
                f"Chat with {args.model}. /reset forgets it, /exit ends it, Ctrl-C stops an answer."
            )
            session.run()
    except KeyboardInterrupt:  # while the model was loaded
        return 130
    return 0
