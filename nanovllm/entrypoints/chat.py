"""The command `chat`: a conversation in the terminal."""

import argparse
import secrets
import sys
from contextlib import closing, suppress
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.common import (
    SAMPLING_OPTIONS,
    CommandError,
    DeferredInterrupt,
    chat_template_kwargs,
    given_options,
    load_llm,
    print_message,
    sampling_params,
)

COMMANDS = """\
  /reset    begins a new conversation
  /exit     ends the chat; so do /quit and the end of the input (Ctrl-D)
  /help     shows these lines
  //...     sends a message that begins with one /
  Ctrl-C    stops the current answer; if there is none, ends the chat
"""
HELP = f"""\
Chat with a model in the terminal. The model sees all that was said so far. When that outgrows
--max-model-len, the oldest messages and answers are dropped; the system message stays.

{COMMANDS}"""
EXAMPLE = """\
example:
  python -m nanovllm chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --temperature 0.6
"""


class Chat:
    """A conversation with the model, read from stdin and printed to stdout.

    Args:
        llm: the engine.
        params: how answers are sampled.
        system: the system message, if there is one.
        template_kwargs: more arguments for the chat template.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, template_kwargs: dict[str, Any]
    ) -> None:
        self.llm = llm
        self.params = params
        self.template_kwargs = template_kwargs
        self.system_messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.system_messages)

    def check_template(self) -> None:
        """Raise CommandError unless the model's chat template accepts a conversation."""
        try:
            self.encode([*self.system_messages, {"role": "user", "content": "Hello"}])
        except ValueError as error:
            raise CommandError(f"no chat with this model: {error}") from error

    def run(self) -> None:
        """Answer each line of stdin until its end, /exit, or Ctrl-C while there is no answer."""
        try:
            while True:
                line = input("> " if sys.stdin.isatty() else "")
                command = line.strip()
                if command in ("/exit", "/quit"):
                    return
                if command == "/reset":
                    self.messages = list(self.system_messages)
                    print_message("The conversation is forgotten.")
                elif command == "/help":
                    print_message(COMMANDS.rstrip())
                elif command.startswith("//"):
                    self.answer(line.replace("/", "", 1))
                elif command.startswith("/"):
                    print_message(
                        f"There is no command {command}, and nothing was sent: /help shows all. "
                        "To send it as a message, begin with //."
                    )
                elif command:
                    self.answer(line)
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()  # ends the line with "> ", so that the shell's prompt has its own

    def answer(self, text: str) -> None:
        """Print the answer to a user's message, and add both to the conversation.

        A message that cannot be answered is reported, and not added.
        """
        max_model_len = self.llm.config.max_model_len
        try:
            messages, prompt = self.with_message(text)
            room = max_model_len - len(prompt)
            if room < 1:
                print_message(
                    f"This message has {len(prompt)} tokens by itself, and at most "
                    f"{max_model_len - 1} fit: it was left out. Write a shorter one, or start with "
                    "a larger --max-model-len if the model allows."
                )
                return
            if dropped := (len(self.messages) + 1 - len(messages)) // 2:
                print_message(
                    f"[the conversation outgrew its {max_model_len} tokens: the oldest {dropped} "
                    "of your messages and their answers are forgotten]"
                )
            pieces = self.llm.stream([prompt], self.params)
        except (TypeError, ValueError) as error:
            print_message(f"This message cannot be answered, and was left out: {error}")
            return
        answer, num_tokens, finish_reason = "", 0, None
        with DeferredInterrupt() as interrupt, closing(pieces), suppress(KeyboardInterrupt):
            for piece in pieces:
                answer += piece["text"]
                num_tokens += len(piece["token_ids"])
                finish_reason = piece["finish_reason"]
                print(piece["text"], end="", flush=True)
                if interrupt.received:
                    break
        print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if finish_reason is None:
            print_message("[stopped; the conversation keeps this part of the answer]")
        elif finish_reason == "length" and num_tokens == room:
            print_message("[the conversation is full: /reset forgets it]")
        elif finish_reason == "length":
            print_message("[cut at --max-tokens]")

    def with_message(self, text: str) -> tuple[list[dict[str, str]], list[int]]:
        """The conversation with a new message of the user, and its token ids. The oldest turns are
        left out if they would leave too little of max_model_len for the answer."""
        max_model_len = self.llm.config.max_model_len
        least_room = min(max_model_len // 4, self.params.max_tokens or max_model_len)
        turns = self.messages[len(self.system_messages) :]
        while True:
            messages = [*self.system_messages, *turns, {"role": "user", "content": text}]
            prompt = self.encode(messages)
            if max_model_len - len(prompt) >= least_room or not turns:
                return messages, prompt
            del turns[:2]  # a message and its answer

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of the conversation, up to where the answer begins."""
        return self.llm.chat_prompt(messages, chat_template_kwargs=self.template_kwargs)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401  gives input() line editing and a history
    options = {"max_tokens": None} | given_options(args, SAMPLING_OPTIONS)
    try:
        # The engine's default seed would give the same answers in each chat.
        with load_llm(args, seed=secrets.randbits(31)) as llm:
            params = sampling_params(llm, options)
            chat = Chat(llm, params, args.system, chat_template_kwargs(args))
            chat.check_template()
            print_message(
                f"Chat with {args.model}. /reset forgets the conversation, /exit ends the chat, "
                "/help shows more, Ctrl-C stops an answer."
            )
            chat.run()
    except KeyboardInterrupt:  # before the chat began
        return 130
    return 0
