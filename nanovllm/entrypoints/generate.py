"""The command `generate`: answers a file of prompts. A run that was stopped can be continued."""

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
from nanovllm.entrypoints.answer_file import encode_answer, read_digests
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
from nanovllm.outputs import RequestOutput

HELP = """\
Answer a file of prompts. Each line of the input is a JSON object with one of

  "prompt"            a string
  "prompt_token_ids"  a list of token ids
  "messages"          a conversation: a list of {"role": ..., "content": ...}

It may also have "sampling_params", an object with arguments of SamplingParams, which override the
options given here, and "id", any JSON value, which is copied to the answer; without one, the id is
the line's number, from 1. Other keys and blank lines are ignored.

Each answer is appended to the output, as one line, as soon as it is complete, so the order is not
the input's. It has "id", "line" (the number of the input line), "digest" (of that line, the model
and the options), "text", "token_ids" and "finish_reason".

If a run is stopped, in whatever way, the same command continues it: lines that the output answers
are skipped. Lines that cannot be answered are reported, and the run goes on; the exit status is
then 1.
"""
EXAMPLE = """\
example:
  echo '{"id": "sky", "prompt": "The sky is", "sampling_params": {"stop": "."}}' > prompts.jsonl
  echo '{"messages": [{"role": "user", "content": "Why is it blue?"}]}' >> prompts.jsonl
  python -m nanovllm generate Qwen/Qwen3-0.6B --input prompts.jsonl --output answers.jsonl
"""

PROMPT_TYPES = {"prompt": str, "prompt_token_ids": list, "messages": list}


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1, blank lines included.
        content: without white space around it.
        digest: differs if the content, the model or an option differs.
    """

    number: int
    content: bytes
    digest: str


@dataclass
class Counts:
    """How many lines are done, by outcome."""

    answered: int = 0
    skipped: int = 0
    bad: int = 0

    def __str__(self) -> str:
        return f"{self.answered} answered, {self.skipped} skipped, {self.bad} bad"


class Generation:
    """One run over an input file.

    Args:
        args: the command line.
        llm: the engine.
        digests: of the answers that the output file has, by line number.
        output_file: open for appending.
        counts, progress: are updated after each line.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        llm: LLM,
        digests: dict[int, str],
        output_file: BinaryIO,
        counts: Counts,
        progress: tqdm,
    ) -> None:
        options = {"seed": 0} | given_options(args, SAMPLING_OPTIONS)
        self.seed = options["seed"]
        self.params = sampling_params(llm, options)
        self.template_kwargs = chat_template_kwargs(args)
        settings = asdict(self.params) | self.template_kwargs | _model_settings(args)
        self.settings = json.dumps(settings, sort_keys=True).encode()
        self.llm = llm
        self.digests = digests
        self.output_file = output_file
        self.counts = counts
        self.progress = progress
        self.pending: dict[int, tuple[Any, Line]] = {}  # request id -> the line's id, the line

    def run(self, input_file: BinaryIO, interrupt: DeferredInterrupt) -> None:
        """Answer the lines that have no answer yet. Returns early after an interrupt."""
        lines = self.unanswered_lines(input_file)
        # Enough for the engine to fill its batches; the file may be larger than memory.
        max_pending = 4 * self.llm.config.max_num_seqs
        while not interrupt.received:
            while len(self.pending) < max_pending and not interrupt.received:
                line = next(lines, None)
                if line is None:
                    break
                self.queue(line)
            if not self.pending:
                return
            for output in self.llm.step():
                self.write(output)

    def unanswered_lines(self, input_file: BinaryIO) -> Iterator[Line]:
        """The lines that the output file does not answer. Reports those that have changed since."""
        for number, content in enumerate(input_file, start=1):
            content = content.strip()
            if not content:
                continue
            digest = hashlib.sha256(content + b"\n" + self.settings).hexdigest()[:16]
            known_digest = self.digests.pop(number, None)
            if known_digest is None:
                yield Line(number, content, digest)
            elif known_digest == digest:
                self.counts.skipped += 1
                self.progress.update()
            else:
                self.report_bad(
                    number,
                    "the output has an answer to another line of this number, or to this one with "
                    "another model or other options: give the input, model and options of that "
                    "run, or another --output",
                )
        for number in sorted(self.digests):
            self.report_bad(
                number,
                "the output has an answer to it, and the input has no such line: give the input of "
                "that run, or another --output",
            )

    def queue(self, line: Line) -> None:
        """Give the line to the engine, or report what is wrong with it."""
        try:
            id_, prompt, params = self.parse(line)
            request_id = self.llm.add_request(prompt, params)
        except (TypeError, ValueError) as error:
            reason = str(error)
            if reason.startswith("prompt 0"):  # the engine counts prompts, and was given only this
                reason = "the prompt" + reason.removeprefix("prompt 0")
            self.report_bad(line.number, reason)
        else:
            self.pending[request_id] = id_, line

    def parse(self, line: Line) -> tuple[Any, str | list[int], SamplingParams]:
        """The id, the prompt and the sampling parameters of a line.

        Raises:
            TypeError, ValueError: if the line is invalid.
        """
        item = _parse_object(line.content)
        id_ = item.get("id", line.number)
        try:
            json.dumps(id_, allow_nan=False)
        except ValueError:
            raise ValueError("id must be a JSON value, and has nan or an infinite number") from None
        keys = [key for key in PROMPT_TYPES if item.get(key) is not None]
        if len(keys) != 1:
            found = " and ".join(keys) or "none"
            raise ValueError(f"it needs one of {', '.join(PROMPT_TYPES)}, and has {found}")
        (key,) = keys
        prompt, expected = item[key], PROMPT_TYPES[key]
        if not isinstance(prompt, expected):
            what = "a string" if expected is str else "a list"
            raise TypeError(f"{key} must be {what}, got {_shortened(prompt)}")
        if key == "messages":
            prompt = self.llm.chat_prompt(prompt, chat_template_kwargs=self.template_kwargs)
        return id_, prompt, self.line_params(item.get("sampling_params"), line.number)

    def line_params(self, given: Any, line_number: int) -> SamplingParams:
        """The sampling parameters of a line: those given in it, and the command's for the rest.

        Raises:
            TypeError, ValueError: if a given one is invalid.
        """
        if given is None:
            given = {}
        if not isinstance(given, dict):
            raise TypeError(f"sampling_params must be an object, got {_shortened(given)}")
        known = [field.name for field in fields(SamplingParams)]
        for name in given:
            if name not in known:
                raise ValueError(f"sampling_params has {name!r}; it takes {', '.join(known)}")
        options = dict(given)
        if isinstance(options.get("logit_bias"), dict):  # its keys are strings, as always in JSON
            bias = options["logit_bias"].items()
            options["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in bias}
        if options.get("seed") in (None, -1):
            options["seed"] = _line_seed(self.seed, line_number)
        params = replace(self.params, **options)
        if params.n != 1 or params.logprobs is not None or params.prompt_logprobs is not None:
            raise ValueError(
                "n, logprobs and prompt_logprobs have no place in the output: repeat the line for "
                "more answers, or use LLM.generate"
            )
        return params

    def write(self, output: RequestOutput) -> None:
        """Append an answer to the output file."""
        id_, line = self.pending.pop(output["request_id"])
        self.output_file.write(encode_answer(id_, line.number, line.digest, output))
        self.output_file.flush()  # so that a killed process loses no complete answer
        self.counts.answered += 1
        self.progress.update()

    def report_bad(self, line_number: int, reason: str) -> None:
        """Tell the user why a line gets no answer."""
        self.counts.bad += 1
        self.progress.update()
        tqdm.write(f"line {line_number}: {reason}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    counts = Counts()
    try:
        with args.input.open("rb") as input_file:
            if args.output.exists() and args.output.samefile(args.input):
                raise CommandError("--output is the input: give it another name")
            digests = read_digests(args.output)
            with (
                args.output.open("ab") as output_file,
                load_llm(args) as llm,
                tqdm(total=_count_lines(args.input), desc="Answering", mininterval=0.5) as progress,
                DeferredInterrupt() as interrupt,
            ):
                generation = Generation(args, llm, digests, output_file, counts, progress)
                generation.run(input_file, interrupt)
                interrupted = interrupt.received
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        print_message(f"Interrupted: {counts}. To go on from here, give the same command again.")
        return 130
    print_message(f"Done: {counts}.")
    return 1 if counts.bad else 0


def _model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What determines the model's logits. The device is left out: a run may continue on another."""
    path = Path(args.model)
    name = str(path.resolve()) if path.is_dir() else args.model
    return {"model": name} | given_options(args, ("dtype", "max_model_len"))


def _count_lines(path: Path) -> int | None:
    """The number of lines that are not blank; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        item = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(item, dict):
        raise ValueError('not a JSON object, such as {"prompt": "Hello"}')
    return item


def _line_seed(seed: int, line_number: int) -> int:
    """The seed of a line that gives none. It is the same in every run."""
    digest = hashlib.sha256(f"{seed} {line_number}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
