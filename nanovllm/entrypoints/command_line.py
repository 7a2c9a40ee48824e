"""The command: `python -m nanovllm chat MODEL`, and `generate` for files of prompts."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from nanovllm import SamplingParams
from nanovllm.entrypoints import chat, generate
from nanovllm.entrypoints.common import SAMPLING_OPTIONS, CommandError, given_options, say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovllm",
        description="Talk with a language model, or have it answer a file of prompts.",
        epilog="`python -m nanovllm chat --help` and `... generate --help` tell more.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _add_command(commands, "chat", "talk with a model", chat.HELP, chat.EXAMPLE)
    command.set_defaults(run=chat.chat)
    command.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    _add_options(command, max_tokens="as many as fit", seed="another one for each answer")

    command = _add_command(
        commands, "generate", "answer a file of prompts", generate.HELP, generate.EXAMPLE
    )
    command.set_defaults(run=generate.generate)
    command.add_argument(
        "--input", required=True, type=Path, metavar="FILE", help="JSON objects, one a line"
    )
    command.add_argument(
        "--output", required=True, type=Path, metavar="FILE",
        help="answers are added to it; those that it has are not asked for again",
    )  # fmt: skip
    _add_options(
        command,
        max_tokens="the checkpoint's, or 64",
        seed="0; each line draws its own from it and the line's number",
    )
    return parser


def _add_command(
    commands: Any, name: str, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=description, epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument(
        "model", metavar="MODEL", help="a checkpoint directory, or a hub id to fetch"
    )
    return command


def _add_options(command: argparse.ArgumentParser, max_tokens: str, seed: str) -> None:
    sampling = command.add_argument_group("sampling", "Unset ones are what the checkpoint says.")
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the most likely token; 1 as learnt"
    )
    sampling.add_argument(
        "--top-p", type=float, metavar="P",
        help="only the most likely tokens that together have this probability",
    )  # fmt: skip
    sampling.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens")
    sampling.add_argument(
        "--min-p", type=float, metavar="P",
        help="only tokens at least P times as likely as the most likely one",
    )  # fmt: skip
    sampling.add_argument(
        "--max-tokens", type=int, metavar="N",
        help=f"the most tokens of an answer (default: {max_tokens})",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=int, metavar="N", help=f"makes answers repeatable (default: {seed})"
    )
    sampling.add_argument(
        "--no-thinking", action="store_true", help="answer at once, where the model knows how to"
    )
    engine = command.add_argument_group("engine")
    engine.add_argument(
        "--device", help='"cpu", "cuda" or "cuda:N" (default: a GPU if there is one)'
    )
    engine.add_argument(
        "--dtype", help='"bfloat16", "float16" or "float32" (default: the checkpoint\'s)'
    )
    engine.add_argument(
        "--max-model-len", type=int, metavar="N",
        help="the most tokens of prompt and answer together (default: 4096, or what the model has)",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process; returns the exit status."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # whatever bytes a terminal sends, or cannot show
            stream.reconfigure(errors="replace")
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        SamplingParams(**given_options(args, SAMPLING_OPTIONS))  # before a model is loaded
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        return args.run(args)
    except (CommandError, OSError) as error:
        say(f"error: {error}")
        return 2
