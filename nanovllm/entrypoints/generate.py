"""The command `generate`: answers a file of prompts. A run that was stopped can be continued."""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.answer_file import encode_answer, lock, read_digests
from nanovllm.entrypoints.common import (
    SAMPLING_OPTIONS,
    CommandError,
    DeferredInterrupt,
    chat_template_kwargs,
    given_options,
    load_llm,
    model_settings,
    print_message,
    sampling_params,
)
from nanovllm.entrypoints.rows import RowParser, parse_object, reason, unknown_keys
from nanovllm.outputs import RequestOutput

HELP = """\
Answer a file of prompts. Each line of the input is a JSON object with one of

  "prompt"            a string
  "prompt_token_ids"  a list of token ids
  "messages"          a conversation: a list of {"role": ..., "content": ...}

It may also have arguments of SamplingParams, such as "max_tokens" and "stop", which override the
options given here: as keys of its own, or together in an object "sampling_params". With "messages"
it may have "tools", a list of JSON schemas, and "chat_template_kwargs", an object. "id", any JSON
value, is copied to the answer; without one, the id is the line's number, from 1. A key that is not
known is reported once, and ignored; so are blank lines.

Each answer is appended to the output, as one line, as soon as it is complete, so the order is not
the input's. It has "id", "line" (the number of the input line), "digest" (of that line, the model
and the options), "text", "token_ids" and "finish_reason".

If a run is stopped, in whatever way, the same command continues it: lines that the output answers
are skipped. If the output has answers to another input, or from another model or other options,
they are reported and nothing is written. Lines that cannot be answered are reported, and the run
goes on; the exit status is then 1.

With --ray, several engines share the work (pip install 'nanovllm[ray]'). --input is then a JSONL or
Parquet file, a directory of such files, or the URL of either, such as s3://bucket/prompts. --output
is a directory or its URL. It gets files of the input's kind, one when a batch is complete, so that
what a stopped run loses is the batches that it was at. Answers also have "file" and "error". A row
that cannot be answered is written too, with the reason in "error" and null in place of an answer,
and is not tried again. A row that has changed in the input is answered anew, and the answer to what
it was before stays. In Parquet the answers' "id" is a string, and arguments of SamplingParams are
read from the column "sampling_params" alone. Continue a run that was stopped when all of its
processes have ended, so that none of them writes any more. On a cluster all paths must be ones that
every node has.
"""
EXAMPLE = """\
example:
  echo '{"id": "sky", "prompt": "The sky is", "sampling_params": {"stop": "."}}' > prompts.jsonl
  echo '{"messages": [{"role": "user", "content": "Why is it blue?"}]}' >> prompts.jsonl
  python -m nanovllm generate Qwen/Qwen3-0.6B --input prompts.jsonl --output answers.jsonl
  python -m nanovllm generate Qwen/Qwen3-0.6B --input prompts --output answers --ray --replicas 8
"""


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
        params = sampling_params(llm, options)
        template_kwargs = chat_template_kwargs(args)
        self.parser = RowParser(llm, params, template_kwargs, options["seed"])
        settings = asdict(params) | template_kwargs | model_settings(args)
        self.settings = json.dumps(settings, sort_keys=True).encode()
        self.llm = llm
        self.digests = digests
        self.output_file = output_file
        self.counts = counts
        self.progress = progress
        self.pending: dict[int, tuple[Any, Line]] = {}  # request id -> the line's id, the line
        self.reported_keys: set[str] = set()

    def run(self, input_file: BinaryIO, interrupt: DeferredInterrupt) -> None:
        """Answer the lines that have no answer yet. Returns early after an interrupt.

        Args:
            input_file: must be seekable if there are answers.
        """
        if self.digests:
            if not self.check_answers(input_file):
                message = "The output has answers to other lines: nothing is written to it."
                tqdm.write(message, file=sys.stderr)
                return
            input_file.seek(0)
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

    def check_answers(self, input_file: BinaryIO) -> bool:
        """Whether all answers in the output are to lines of this input, with this model and these
        options. Reports those that are not."""
        missing = dict(self.digests)
        for line in self.lines(input_file):
            known_digest = missing.pop(line.number, None)
            if known_digest == line.digest:
                self.counts.skipped += 1
                self.progress.update()
            elif known_digest is not None:
                self.report_bad(
                    line.number,
                    "the output has an answer to another line of this number, or to this one with "
                    "another model or other options: give the input, model and options of that "
                    "run, or another --output",
                )
        for number in sorted(missing):
            self.report_bad(
                number,
                "the output has an answer to it, and the input has no such line: give the input of "
                "that run, or another --output",
            )
        return self.counts.bad == 0

    def unanswered_lines(self, input_file: BinaryIO) -> Iterator[Line]:
        return (line for line in self.lines(input_file) if line.number not in self.digests)

    def lines(self, input_file: BinaryIO) -> Iterator[Line]:
        """The lines that are not blank."""
        for number, content in enumerate(input_file, start=1):
            if content := content.strip():
                digest = hashlib.sha256(content + b"\n" + self.settings).hexdigest()[:16]
                yield Line(number, content, digest)

    def queue(self, line: Line) -> None:
        """Give the line to the engine, or report what is wrong with it."""
        try:
            id_, prompt, params = self.parse(line)
            request_id = self.llm.add_request(prompt, params)
        except (TypeError, ValueError) as error:
            self.report_bad(line.number, reason(error))
        else:
            self.pending[request_id] = id_, line

    def parse(self, line: Line) -> tuple[Any, str | list[int], SamplingParams]:
        """The id, the prompt and the sampling parameters of a line.

        Raises:
            TypeError, ValueError: if the line is invalid.
        """
        item = parse_object(line.content)
        for key in unknown_keys(item):
            if key not in self.reported_keys:
                self.reported_keys.add(key)
                tqdm.write(unknown_key_message(key, f"line {line.number}"), file=sys.stderr)
        prompt, params = self.parser.parse(item, line.number)
        return item.get("id", line.number), prompt, params

    def write(self, output: RequestOutput) -> None:
        """Append an answer to the output file."""
        id_, line = self.pending.pop(output["request_id"])
        if (why := output.error) is not None:
            self.report_bad(line.number, why)
            return
        self.output_file.write(encode_answer(id_, line.number, line.digest, output))
        self.output_file.flush()  # so that a killed process loses no complete answer
        self.counts.answered += 1
        self.progress.update()

    def report_bad(self, line_number: int, why: str) -> None:
        """Tell the user why a line gets no answer."""
        self.counts.bad += 1
        self.progress.update()
        tqdm.write(f"line {line_number}: {why}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if args.ray:
        from nanovllm.entrypoints import ray_generate  # Ray is an extra, and takes long to import

        return ray_generate.run(args)
    if args.replicas is not None or args.batch_size is not None:
        raise CommandError("--replicas and --batch-size go with --ray: add it, or leave them out")
    counts = Counts()
    input_path, output_path = Path(args.input), Path(args.output)
    try:
        with input_path.open("rb") as input_file:
            if output_path.exists() and output_path.samefile(input_path):
                raise CommandError("--output is the input: give it another name")
            with output_path.open("ab") as output_file:
                lock(output_file, output_file.name)  # before the file is read, and maybe cut
                digests = read_digests(output_path)
                with (
                    _seekable(input_file) if digests else nullcontext(input_file) as lines,
                    load_llm(args) as llm,
                    tqdm(
                        total=_count_lines(input_path), desc="Answering", mininterval=0.5
                    ) as progress,
                    DeferredInterrupt() as interrupt,
                ):
                    generation = Generation(args, llm, digests, output_file, counts, progress)
                    generation.run(lines, interrupt)
                    interrupted = interrupt.received
    except KeyboardInterrupt:
        interrupted = True
    return end(counts, interrupted)


def end(counts: Counts, interrupted: bool) -> int:
    """Tell the user how a run ended, and return the exit status."""
    if interrupted:
        print_message(f"Interrupted: {counts}. To go on from here, give the same command again.")
        return 130
    print_message(f"Done: {counts}.")
    return 1 if counts.bad else 0


def unknown_key_message(key: str, where: str) -> str:
    """What the user is told of a key that does nothing."""
    return f"warning: {where} has the key {key!r}, which is not known, and ignored in all lines"


@contextmanager
def _seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file; for a pipe, a file of what it has."""
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy


def _count_lines(path: Path) -> int | None:
    """The number of lines that are not blank; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)
