"""The command line of `python -m nanovllm`: its options, and which command runs."""

import argparse
import io
import sys
from types import ModuleType
from typing import Any

from nanovllm import SamplingParams
from nanovllm.entrypoints import chat, generate
from nanovllm.entrypoints.common import (
    SAMPLING_OPTIONS,
    CommandError,
    given_options,
    print_message,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names, by default `sys.argv`. Returns the exit status."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may send bytes that are not valid text, or be unable to show a character.
            stream.reconfigure(errors="replace")
    parser = _build_parser()
    args = parser.parse_args(argv)
    try:
        # Loading a model takes long: an invalid option is reported before.
        SamplingParams(**given_options(args, SAMPLING_OPTIONS))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        return args.run(args)
    except (CommandError, OSError) as error:
        print_message(f"error: {error}")
        return 2


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovllm",
        description="Chat with a language model, or let it answer a file of prompts.",
        epilog="`python -m nanovllm chat --help` and `... generate --help` tell more.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _add_command(commands, "chat", "chat with a model", chat)
    command.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    _add_options(command, max_tokens="as many as fit", seed="a new one for each answer")

    command = _add_command(commands, "generate", "answer a file of prompts", generate)
    command.add_argument(
        "--input", required=True, metavar="FILE", help="prompts: one JSON object a line"
    )
    command.add_argument(
        "--output", required=True, metavar="FILE",
        help="answers are appended to it; a prompt that it already answers is skipped",
    )  # fmt: skip
    cluster = command.add_argument_group("Ray", "See above for what changes with --ray.")
    cluster.add_argument(
        "--ray", action="store_true",
        help="answer with several engines, on the Ray cluster of RAY_ADDRESS or else this machine",
    )  # fmt: skip
    cluster.add_argument(
        "--replicas", type=int, metavar="N",
        help="engines, each on --tensor-parallel-size GPUs (default: 1)",
    )  # fmt: skip
    cluster.add_argument(
        "--batch-size", type=int, metavar="N",
        help="rows that an engine answers together and writes as one file; they are lost if it "
        "dies, and done again (default: 1024)",
    )  # fmt: skip
    _add_options(
        command,
        max_tokens="the checkpoint's, or 64",
        seed="0; the seed of a line is computed from it and the line's number",
    )
    return parser


def _add_command(
    commands: Any, name: str, summary: str, module: ModuleType
) -> argparse.ArgumentParser:
    """Add the command that `module` implements, with its help text, and the argument MODEL."""
    command = commands.add_parser(
        name, help=summary, description=module.HELP, epilog=module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=module.run)
    command.add_argument(
        "model", metavar="MODEL", help="a checkpoint directory, or a hub id to download"
    )
    return command


def _add_options(command: argparse.ArgumentParser, max_tokens: str, seed: str) -> None:
    """Add the sampling and engine options. `max_tokens` and `seed` describe their defaults."""
    sampling = command.add_argument_group(
        "sampling", "Options that are not given have the values that the checkpoint recommends."
    )
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="0 always takes the most likely token"
    )
    sampling.add_argument(
        "--top-p", type=float, metavar="P",
        help="sample from the fewest most likely tokens whose probabilities add up to P",
    )  # fmt: skip
    sampling.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens"
    )
    sampling.add_argument(
        "--min-p", type=float, metavar="P",
        help="sample from tokens at least P times as likely as the most likely one",
    )  # fmt: skip
    sampling.add_argument(
        "--max-tokens", type=int, metavar="N",
        help=f"the most tokens of an answer (default: {max_tokens})",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=int, metavar="N", help=f"makes answers repeatable (default: {seed})"
    )
    sampling.add_argument(
        "--no-thinking", action="store_true", help="answer without thinking, if the model can"
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
        help="the most tokens of prompt and answer together (default: as many as the model and "
        "the memory allow)",
    )  # fmt: skip
    engine.add_argument(
        "--tensor-parallel-size", type=int, metavar="N",
        help="GPUs over which the model is split (default: 1)",
    )  # fmt: skip
