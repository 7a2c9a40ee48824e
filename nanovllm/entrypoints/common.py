"""What the commands share: the engine and parameters from options, Ctrl-C, words to the person."""

import argparse
import signal
import sys
from dataclasses import replace
from types import FrameType
from typing import Any

from nanovllm import LLM, SamplingParams

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
ENGINE_OPTIONS = ("device", "dtype", "max_model_len")


class CommandError(Exception):
    """Ends the command with a message."""


class HeldInterrupt:
    """A context in which Ctrl-C only sets `seen`, and a second one raises KeyboardInterrupt.

    The engine finishes the step it is in, so that its prefix cache and what is written stay whole.
    """

    def __enter__(self) -> "HeldInterrupt":
        self.seen = False
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True


def say(text: str) -> None:
    """A word from the program; the standard output is for the model's."""
    print(text, file=sys.stderr, flush=True)


def load(args: argparse.Namespace, **options: Any) -> LLM:
    """The engine, with the options given on the command line and these."""
    try:
        return LLM(args.model, **given_options(args, ENGINE_OPTIONS), **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def params_of(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    """The checkpoint's sampling parameters, with these options over them."""
    try:
        return replace(llm.get_default_sampling_params(), **options)
    except (TypeError, ValueError) as error:
        raise CommandError(
            f"generation_config.json of {llm.config.model_dir} cannot be used: {error}"
        ) from error


def given_options(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def thinking_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    return {"enable_thinking": False} if args.no_thinking else {}
