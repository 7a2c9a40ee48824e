"""`python -m nanovllm generate`: answers to a file of prompts, which a stopped run resumes."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

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

PROMPT_KEYS = {"prompt": str, "prompt_token_ids": list, "messages": list}
HELP = """\
Answer a file of prompts. Each line of the input is a JSON object with one of

  "prompt"            a string
  "prompt_token_ids"  a list of token ids
  "messages"          a conversation: a list of {"role": ..., "content": ...}

and, if you like, "sampling_params", an object with arguments of SamplingParams, which go before the
options given here, and "id", any JSON value; without one, the line's number, from 1. Other keys and
blank lines are ignored.

Each answer is a line added to the output as soon as it is there, so not in the input's order, with
"id", "line" (the number of the input line), "digest" (of that line, the model and the options),
"text", "token_ids" and "finish_reason".

If a run is stopped, however that happens, the same command goes on where it was: lines that the
output answers are skipped. Lines that cannot be answered are reported, and the rest goes on; the
exit status is then 1.
"""
EXAMPLE = """\
example:
  echo '{"id": "sky", "prompt": "The sky is", "sampling_params": {"stop": "."}}' > prompts.jsonl
  echo '{"messages": [{"role": "user", "content": "Why is it blue?"}]}' >> prompts.jsonl
  python -m nanovllm generate Qwen/Qwen3-0.6B --input prompts.jsonl --output answers.jsonl
"""


@dataclass(frozen=True)
class Line:
    """A line of the input: its number, from 1, and its content.

    `digest` tells this content, asked of this model with these options, from another.
    """

    number: int
    content: bytes
    digest: str


@dataclass
class Tally:
    """How many lines came to which end."""

    answered: int = 0
    skipped: int = 0
    bad: int = 0

    def __str__(self) -> str:
        return f"{self.answered} answered, {self.skipped} skipped, {self.bad} bad"


class Generation:
    """One run over an input file.

    Args:
        llm: the engine.
        options: the sampling options given to the command, the seed among them.
        template_kwargs: for the chat template.
        model: what the answers depend on besides: the model's name and the engine's options.
        answered: the digest of each line that the output answers, by its number.
        sink: the output, open to be added to.
        tally: counts lines as they end.
        progress: the same for people to see.
    """

    def __init__(
        self,
        llm: LLM,
        options: dict[str, Any],
        template_kwargs: dict[str, Any],
        model: dict[str, Any],
        answered: dict[int, str],
        sink: BinaryIO,
        tally: Tally,
        progress: tqdm,
    ) -> None:
        self.llm = llm
        self.options = options
        self.params = params_of(llm, options)
        self.template_kwargs = template_kwargs
        self.model = model
        self.answered = answered
        self.sink = sink
        self.tally = tally
        self.progress = progress
        self.asked: dict[int, dict[str, Any]] = {}  # what is known of an answer, by request id

    def run(self, source: BinaryIO, interrupt: HeldInterrupt) -> bool:
        """Answer what is not answered yet, a limited number of lines at a time.

        Returns:
            whether every line came to its end; False if interrupted.
        """
        lines = self.new_lines(source)
        most = 4 * self.llm.config.max_num_seqs
        while not interrupt.seen:
            while len(self.asked) < most and not interrupt.seen:
                line = next(lines, None)
                if line is None:
                    break
                self.ask(line)
            if not self.asked:
                return not interrupt.seen
            for output in self.llm.step():
                self.write(output)
        return False

    def new_lines(self, source: BinaryIO) -> Iterator[Line]:
        """The lines that the output does not answer; refuses those that it answers differently."""
        options = asdict(self.params) | self.template_kwargs | self.model
        options = json.dumps(options, sort_keys=True).encode()
        for number, content in enumerate(source, start=1):
            content = content.strip()
            if not content:
                continue
            digest = hashlib.sha256(content + b"\n" + options).hexdigest()[:16]
            known = self.answered.pop(number, None)
            if known is None:
                yield Line(number, content, digest)
            elif known == digest:
                self.tally.skipped += 1
                self.progress.update()
            else:
                self.refuse(
                    number,
                    "the output has an answer to another line of this number, or to this one with "
                    "another model or other options: give the input, model and options of that "
                    "run, or another --output",
                )
        for missing in sorted(self.answered):
            self.refuse(
                missing,
                "the output has an answer to it, and the input has no such line: give the input of "
                "that run, or another --output",
            )

    def ask(self, line: Line) -> None:
        """Queue a line, or refuse it."""
        try:
            id_, prompt, params = self.parse(line)
            request_id = self.llm.add_request(prompt, params)
        except (TypeError, ValueError) as error:
            reason = str(error)
            if reason.startswith("prompt 0"):  # the engine's list of prompts is this one
                reason = "the prompt" + reason.removeprefix("prompt 0")
            self.refuse(line.number, reason)
            return
        self.asked[request_id] = {"id": id_, "line": line.number, "digest": line.digest}

    def parse(self, line: Line) -> tuple[Any, str | list[int], SamplingParams]:
        """The id, the prompt and the sampling parameters of a line.

        Raises:
            TypeError, ValueError: with what is wrong.
        """
        try:
            item = json.loads(line.content)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg}, at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(item, dict):
            raise ValueError('not a JSON object, such as {"prompt": "Hello"}')
        id_ = item.get("id", line.number)
        try:
            json.dumps(id_, allow_nan=False)
        except ValueError:
            raise ValueError("id must be a JSON value, and has nan or an infinite number") from None
        keys = [name for name in PROMPT_KEYS if item.get(name) is not None]
        if len(keys) != 1:
            found = " and ".join(keys) or "none"
            raise ValueError(f"it needs one of {', '.join(PROMPT_KEYS)}, and has {found}")
        (name,) = keys
        prompt, expected = item[name], PROMPT_KEYS[name]
        if not isinstance(prompt, expected):
            what = "a string" if expected is str else "a list"
            raise TypeError(f"{name} must be {what}, got {_shortened(prompt)}")
        if name == "messages":
            prompt = self.llm.chat_prompt(prompt, chat_template_kwargs=self.template_kwargs)
        return id_, prompt, self.line_params(item.get("sampling_params"), line.number)

    def line_params(self, given: Any, number: int) -> SamplingParams:
        """The command's parameters with a line's over them, and a seed of the line's own."""
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise TypeError(f"sampling_params must be an object, got {_shortened(given)}")
        known = [field.name for field in fields(SamplingParams)]
        for name in given:
            if name not in known:
                raise ValueError(f"sampling_params has {name!r}; it takes {', '.join(known)}")
        if isinstance(given.get("logit_bias"), dict):  # the keys of JSON are strings
            bias = given["logit_bias"].items()
            given = given | {"logit_bias": {int(k) if k.isdecimal() else k: v for k, v in bias}}
        if given.get("seed") in (None, -1):
            given = given | {"seed": _line_seed(self.options["seed"], number)}
        params = replace(self.params, **given)
        if params.n != 1 or params.logprobs is not None or params.prompt_logprobs is not None:
            raise ValueError(
                "n, logprobs and prompt_logprobs have no place in the output: repeat the line for "
                "more answers, or use LLM.generate"
            )
        return params

    def write(self, output: dict[str, Any]) -> None:
        """Add an answer to the output, for good."""
        record = self.asked.pop(output["request_id"])
        record |= {key: output[key] for key in ("text", "token_ids", "finish_reason")}
        # Of what an id may hold, only halves of surrogate pairs cannot be UTF-8: escaped, as JSON.
        text = json.dumps(record, ensure_ascii=False)
        self.sink.write(text.encode("utf-8", "backslashreplace") + b"\n")
        self.sink.flush()
        self.tally.answered += 1
        self.progress.update()

    def refuse(self, number: int, reason: str) -> None:
        """Say what is wrong with a line."""
        self.tally.bad += 1
        self.progress.update()
        tqdm.write(f"line {number}: {reason}", file=sys.stderr)


def generate(args: argparse.Namespace) -> int:
    """The command `generate`."""
    options = {"seed": 0} | given_options(args, SAMPLING_OPTIONS)
    path = Path(args.model)
    model = {"model": str(path.resolve()) if path.is_dir() else args.model}
    model |= given_options(args, ("dtype", "max_model_len"))
    tally = Tally()
    try:
        with args.input.open("rb") as source:
            if args.output.exists() and args.output.samefile(args.input):
                raise CommandError("--output is the input: give it another name")
            answered = read_answers(args.output)
            with (
                args.output.open("ab") as sink,
                load(args) as llm,
                tqdm(total=_count_lines(args.input), desc="Answering", mininterval=0.5) as progress,
                HeldInterrupt() as interrupt,
            ):
                run = Generation(
                    llm, options, thinking_kwargs(args), model, answered, sink, tally, progress
                )
                interrupted = not run.run(source, interrupt)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        say(f"Interrupted: {tally}. To go on from here, give the same command again.")
        return 130
    say(f"Done: {tally}.")
    return 1 if tally.bad else 0


def read_answers(path: Path) -> dict[int, str]:
    """The digest of each line that an output file answers; a torn last line is taken off the file.

    Raises:
        CommandError: if the file is something else than such an output.
    """
    answered: dict[int, str] = {}
    if not path.is_file():  # not yet there, or a pipe
        return answered
    end = 0  # of what is whole
    with path.open("rb+") as file:
        for number, content in enumerate(file, start=1):
            is_whole = content.endswith(b"\n")
            if not is_whole and _may_be_torn(content):
                file.truncate(end)
                break
            try:
                record = json.loads(content)
                known = isinstance(record["line"], int) and isinstance(record["digest"], str)
                if not is_whole or not known:
                    raise ValueError
            except (ValueError, RecursionError, TypeError, KeyError):
                raise CommandError(
                    f"line {number} of {path} is not what this command writes: give another "
                    "--output, or take that line out"
                ) from None
            answered[record["line"]] = record["digest"]
            end += len(content)
    return answered


def _may_be_torn(content: bytes) -> bool:
    """Whether an unfinished line may be the beginning of one that this command writes."""
    text, start, follows = content.decode(errors="replace"), '{"id": ', ', "line": '
    if not text.startswith(start):
        return start.startswith(text)
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(start))
    except (ValueError, RecursionError):  # in the middle of the id
        return True
    return text[end:].startswith(follows) or follows.startswith(text[end:])


def _count_lines(path: Path) -> int | None:
    """The lines that are not blank; None if the file can be read only once, as a pipe."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def _line_seed(seed: int, number: int) -> int:
    """The seed of a line that has none: 64 bits that its number and the command's seed decide."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "little")


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
