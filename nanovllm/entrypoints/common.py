"""What `chat` and `generate` share: loading the model, options, Ctrl-C, messages to the user."""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from nanovllm import LLM, SamplingParams

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
ENGINE_OPTIONS = ("device", "dtype", "max_model_len", "tensor_parallel_size")


class CommandError(Exception):
    """Ends the command. The user sees the message, without a traceback."""


class DeferredInterrupt:
    """A context in which the first Ctrl-C only sets `received`; a second raises KeyboardInterrupt.

    An exception could leave the engine in the middle of a step, or the output file in the middle
    of a line. The code inside the context checks `received` where it is safe to stop.
    """

    def __enter__(self) -> "DeferredInterrupt":
        self.received = False
        self._previous_handler = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def print_message(text: str) -> None:
    """Print a message of the program to stderr: stdout has only what the model says."""
    print(text, file=sys.stderr, flush=True)


def load_llm(args: argparse.Namespace, **options: Any) -> LLM:
    """Load the model with the engine options of the command line and with `options`.

    Raises:
        CommandError: if it cannot be loaded.
    """
    try:
        return LLM(args.model, **given_options(args, ENGINE_OPTIONS), **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def sampling_params(llm: LLM, options: dict[str, Any]) -> SamplingParams:
    """The sampling parameters that the checkpoint recommends, overridden by `options`.

    Raises:
        CommandError: if the checkpoint's values are invalid.
    """
    try:
        return replace(llm.get_default_sampling_params(), **options)
    except (TypeError, ValueError) as error:
        raise CommandError(
            f"generation_config.json of {llm.config.model_dir} cannot be used: {error}"
        ) from error


def given_options(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options among `names` that the command line sets, with their values."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def chat_template_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    return {"enable_thinking": False} if args.no_thinking else {}


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What determines the model's logits. The device is left out: a run may continue on another."""
    path = Path(args.model)
    name = str(path.resolve()) if path.is_dir() else args.model
    return {"model": name} | given_options(args, ("dtype", "max_model_len"))
