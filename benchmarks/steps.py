"""The steps of a small run, one by one: what docs/tour.md tells of, printed and drawn.

    python -m benchmarks.steps                           # what each step got, and what it gave
    python -m benchmarks.steps --output docs/steps.png   # the picture

Three chats run with the demo model on the CPU, with `async_scheduling`, in a KV cache of eight
blocks. A's prompt is longer than a step may be, and runs in chunks. B begins as A does and finds
those blocks in the prefix cache; it is preempted when A needs a block and none is free. C waits for
room.
"""

import argparse
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from benchmarks.timeline import CACHE, DECODE, PREEMPTION, PREFILL, WAITING
from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step import PendingStep
from nanovllm.engine.step_inputs import StepShape

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "tiny-qwen3"
MAX_TOKENS = 32  # of a step
ENGINE = {
    "device": "cpu", "async_scheduling": True, "kvcache_block_size": 16, "num_kvcache_blocks": 8,
    "max_num_batched_tokens": MAX_TOKENS, "max_model_len": 128,
}  # fmt: skip
HELLO = [
    ("system", "You are a helpful assistant."),
    ("user", "Hello!"),
    (
        "assistant",
        "Hello! I am a tiny demo model of nanovllm, with about one million parameters. For real "
        "answers, please name a real model, such as Qwen/Qwen3-0.6B.",
    ),
]
BYE = [("user", "Bye!"), ("assistant", "Goodbye!")]
CHATS = {  # each with the most tokens of its answer
    "A": ([*HELLO, *BYE, ("user", "47 + 38 =")], 16),
    "B": ([*HELLO, ("user", "List the primes under 20.")], 10),
    "C": ([("user", "Thank you!")], 16),
}
TIMED = range(5, 12)  # the steps on the picture's time axis
CAPTION = (
    "This is a CPU: launch computes the step itself, in the same thread, and the order gains "
    "nothing. On a GPU launch only queues\nthe work: the device computes step N+1 while the host "
    "collects step N and plans step N+2."
)
CENTER: dict[str, Any] = {"ha": "center", "va": "center", "size": 8}
RIGHT: dict[str, Any] = {"ha": "right", "va": "center", "size": 8}


@dataclass
class Row:
    """A request's part in a step."""

    request: str
    start: int  # the first position that is run
    length: int
    samples: bool
    is_admitted: bool  # by this step: what comes before `start` was in the prefix cache
    block_table: list[int]
    token_id: int | None = None  # the token sampled
    is_discarded: bool = False  # since the request had ended when the token was read


@dataclass
class Step:
    """A step from its plan to its tokens. Times are those of `perf_counter`."""

    is_prefill: bool
    rows: list[Row]
    waiting: list[str]
    idle: list[str]  # running, and nothing of them to run in this step
    preempted: list[str]
    holders: list[str]  # of each block: the letters of the requests that hold it
    is_findable: list[bool]  # of each block: whether the prefix cache knows what it holds
    plan_start: float
    inputs: dict[str, list[int]] = field(default_factory=dict)  # as they were sent to the device
    launch_end: float = 0.0
    collect_start: float = 0.0
    collect_end: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(row.length for row in self.rows)

    @property
    def blocks_in_use(self) -> int:
        return sum(map(bool, self.holders))


def run(repeats: int = 20) -> tuple[list[Step], dict[int, str]]:
    """The steps of the three chats, and the text of each token.

    Of equal runs that one is taken in which the steps on the time axis were disturbed least. One
    thread computes: so small a model gains nothing from more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with LLM(DEMO_MODEL, **ENGINE) as llm:
            _run_once(llm)  # to warm up
            runs = [_run_once(llm) for _ in range(repeats)]
            fastest = min(runs, key=_timed_seconds)
            token_ids = {row.token_id for step in fastest for row in step.rows if row.samples}
            return fastest, {token_id: llm.tokenizer.decode([token_id]) for token_id in token_ids}
    finally:
        torch.set_num_threads(threads)


def _timed_seconds(steps: list[Step]) -> float:
    return steps[TIMED[-1] - 1].collect_end - steps[TIMED[0] - 1].plan_start


def _run_once(llm: LLM) -> list[Step]:
    llm.abort_all()  # which also empties the prefix cache
    letters = {}
    for letter, (chat, max_tokens) in CHATS.items():
        prompt = llm.chat_prompt([{"role": role, "content": text} for role, text in chat])
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        letters[llm.add_request(prompt, params)] = letter
    with recorded(llm, letters) as steps:
        while not llm.is_finished():
            llm.step()
    return steps


@contextmanager
def recorded(llm: LLM, letters: dict[int, str]) -> Iterator[list[Step]]:
    """The steps that an engine runs in the block. `letters` names its sequences, by their ids."""
    scheduler, runner = llm.scheduler, llm.model_runner
    manager, buffers = scheduler.block_manager, runner.inputs
    schedule, postprocess = scheduler.schedule, scheduler.postprocess
    launch, collect, fill = runner.launch, runner.collect, buffers.fill
    steps: list[Step] = []
    shapes: list[StepShape] = []

    def names(sequences: Iterable[Sequence]) -> list[str]:
        return [letters[seq.seq_id] for seq in sequences]

    def recorded_schedule() -> Batch | None:
        start, was_running = perf_counter(), list(scheduler.running)
        batch = schedule()
        if batch is None:
            return None
        rows = [
            Row(letters[seq.seq_id], *numbers, seq not in was_running, list(seq.block_table))
            for seq, *numbers in zip(batch.seqs, batch.starts, batch.lengths, batch.yields_token)
        ]
        preempted = [seq for seq in was_running if seq.status is SequenceStatus.WAITING]
        idle = [seq for seq in scheduler.running if seq not in batch.seqs]
        holders = [
            "".join(names(seq for seq in scheduler.running if block_id in seq.block_table))
            for block_id in range(len(manager.blocks))
        ]
        is_findable = [manager.block_of_hash.get(block.hash) is block for block in manager.blocks]
        steps.append(
            Step(
                batch.is_prefill, rows, names(scheduler.waiting), names(idle), names(preempted),
                holders, is_findable, start,
            )
        )  # fmt: skip
        return batch

    def recorded_fill(*args: Any, **options: Any) -> tuple[StepShape, int]:
        shape, num_words = fill(*args, **options)
        shapes.append(shape)
        return shape, num_words

    def recorded_launch(batch: Batch, before_it_runs: Callable[[], None]) -> PendingStep:
        pending = launch(batch, before_it_runs)
        steps[-1].launch_end = perf_counter()
        sent = buffers.view(shapes[-1])
        for name in ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "context_lens"):
            steps[-1].inputs[name] = getattr(sent, name).tolist()
        return pending

    def recorded_collect(pending: PendingStep) -> list[int]:
        oldest = next(step for step in steps if not step.collect_start)
        oldest.collect_start = perf_counter()
        return collect(pending)

    def recorded_postprocess(batch: Batch, token_ids: list[int]) -> list[int]:
        counted = postprocess(batch, token_ids)
        oldest = next(step for step in steps if not step.collect_end)
        oldest.collect_end = perf_counter()
        for index, row in enumerate(oldest.rows):
            if row.samples:
                row.token_id, row.is_discarded = token_ids[index], index not in counted
        return counted

    scheduler.schedule, scheduler.postprocess = recorded_schedule, recorded_postprocess
    runner.launch, runner.collect, buffers.fill = recorded_launch, recorded_collect, recorded_fill
    try:
        yield steps
    finally:  # those of the classes are back
        del scheduler.schedule, scheduler.postprocess, runner.launch, runner.collect, buffers.fill


def listing(steps: list[Step], texts: dict[int, str]) -> str:
    """Each step in a few lines: its rows, what was sent to the device, what came out."""
    lines = []
    for number, step in enumerate(steps, 1):
        kind = "prefill" if step.is_prefill else "decode"
        waiting = f", waiting: {' '.join(step.waiting)}" if step.waiting else ""
        lines.append(f"step {number}: {kind}, blocks in use: {step.blocks_in_use}{waiting}")
        lines += [f"  {letter} is preempted" for letter in step.preempted]
        for row in step.rows:
            cached = f", {row.start} tokens cached" if row.is_admitted else ""
            token = f" -> {texts[row.token_id]!r}" if row.token_id is not None else ""
            end = " (discarded)" if row.is_discarded else ""
            table = " ".join(map(str, row.block_table))
            lines.append(f"  {row.request}: block table {table}{cached}{token}{end}")
        lines += [f"  {name:12} {_short(values)}" for name, values in step.inputs.items()]
    return "\n".join(lines)


def _short(values: list[int]) -> str:
    """Numbers, with 3..7 for 3 4 5 6 7."""
    words: list[str] = []
    for first, last in _runs(values):
        is_long = last - first > 2
        words += [f"{first}..{last}"] if is_long else map(str, range(first, last + 1))
    return " ".join(words)


def draw(steps: list[Step], texts: dict[int, str], path: Path) -> None:
    """Write the picture of a recorded run to `path`, as PNG."""
    figure, (rows, blocks, time) = plt.subplots(
        3, 1, figsize=(9, 7.9), layout="constrained", height_ratios=(2, 1.8, 1.2)
    )
    _draw_rows(rows, steps, texts)
    _draw_blocks(blocks, steps)
    _draw_time(time, steps)
    figure.supxlabel(CAPTION, fontsize=8.5, x=0.01, ha="left")
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)


def _draw_rows(axes: Axes, steps: list[Step], texts: dict[int, str]) -> None:
    looks = {
        "prefill": (PREFILL, 0.25), "decode": (DECODE, 0.22), "found in prefix cache": (CACHE, 0.5),
        "came too late: discarded": "white",
    }  # fmt: skip
    _dress_grid(axes, steps, "each step: positions that it runs, token that it samples", looks)
    for y, (letter, (chat, _)) in enumerate(CHATS.items()):
        axes.text(0.4, y, f"{letter}\n{textwrap.fill(chat[-1][1], 16)}", **RIGHT)
        for first, last in _runs(n for n, step in enumerate(steps, 1) if letter in step.waiting):
            _box(axes, (first, last), (y - 0.43, y + 0.43), (WAITING, 0.1))
            if letter in steps[first - 1].preempted:
                axes.plot(first - 0.28, y, "v", color=PREEMPTION, markersize=6, markeredgewidth=0)
                note, color, x = "preempted, waits", PREEMPTION, first
            else:
                is_full = all(step.num_tokens == MAX_TOKENS for step in steps[first - 1 : last])
                note = "steps are full" if is_full else "waits for free blocks"
                color, x = WAITING, first - 0.3
            axes.text(x, y, note, color=color, size=8, va="center")
    for number, step in enumerate(steps, 1):
        for letter in step.idle:
            axes.text(number, [*CHATS].index(letter), "idle", **CENTER, color=WAITING)
        for row in step.rows:
            word = "" if row.token_id is None else texts[row.token_id]
            _draw_row(axes, number, row, PREFILL if step.is_prefill else DECODE, word)
    axes.set(ylim=(len(CHATS) - 0.5, -0.5))


def _draw_row(axes: Axes, number: int, row: Row, color: str, word: str) -> None:
    y = [*CHATS].index(row.request)
    shade, ink = (0, 0.45) if row.is_discarded else (0.24, 1)
    _box(axes, (number, number), (y - 0.43, y + 0.43), (color, shade), color)
    span = f"{row.start}-{row.start + row.length - 1}" if row.length > 1 else row.start
    axes.text(number, y - 0.2, span, **CENTER)
    word = word.strip().replace("<|im_end|>", "end")
    size = 8 if len(word) < 6 else 6.5
    axes.text(number, y + 0.05, word, **CENTER | {"size": size}, color=color, alpha=ink)
    if row.is_admitted and row.start:
        _box(axes, (number, number), (y + 0.2, y + 0.43), (CACHE, 0.5))
        axes.text(number, y + 0.315, f"{row.start} hit", **CENTER)


def _draw_blocks(axes: Axes, steps: list[Step]) -> None:
    looks = {
        "held": (CACHE, 0.25), "shared": (CACHE, 0.6), "free, can be found again": (CACHE, 0.07),
        "free": "white",
    }  # fmt: skip
    _dress_grid(axes, steps, "KV cache: which request holds each block", looks)
    num_blocks = len(steps[0].holders)
    for number, step in enumerate(steps, 1):
        for block_id, (holders, findable) in enumerate(zip(step.holders, step.is_findable)):
            held = "shared" if len(holders) > 1 else "held"
            free = "free, can be found again" if findable else "free"
            edges = (number, number), (block_id - 0.43, block_id + 0.43)
            _box(axes, *edges, looks[held if holders else free], CACHE)
            was_taken = step.preempted and holders not in steps[number - 2].holders[block_id]
            color = PREEMPTION if was_taken else "black"
            axes.text(number, block_id, holders, **CENTER, color=color)
        axes.text(number, num_blocks, step.blocks_in_use, **CENTER)
    for y, label in enumerate([*(f"block {i}" for i in range(num_blocks)), "in use"]):
        axes.text(0.4, y, label, **RIGHT)
    axes.set(ylim=(num_blocks + 0.5, -0.5))


def _draw_time(axes: Axes, steps: list[Step]) -> None:
    """Two lanes, as a step begins before the one before it has ended."""
    title = "time on the host: step N+1 is launched before the tokens of step N are collected"
    _dress(axes, title, {"launch": (DECODE, 0.5), "tokens not read yet": (DECODE, 0.12)})
    origin = steps[TIMED[0] - 1].plan_start
    for number in TIMED:
        step, lane = steps[number - 1], 1 - number % 2
        times = (step.plan_start, step.launch_end, step.collect_start)
        start, launched, read = (1e3 * (time - origin) for time in times)
        axes.barh(lane, launched - start, 0.5, start, color=DECODE, alpha=0.5)
        axes.barh(lane, read - launched, 0.5, launched, color=DECODE, alpha=0.12)
        axes.plot([read, read], [lane - 0.25, lane + 0.36], color=PREEMPTION, linewidth=1.6)
        axes.text((start + launched) / 2, lane, f"launch {number}", **CENTER)
        axes.text(read, lane + 0.46, f"collect {number} ", **RIGHT, color=PREEMPTION)
    axes.set(ylim=(1.6, -0.35), yticks=[], xlim=(0, None))
    axes.set_xlabel(f"milliseconds since step {TIMED[0]} was planned", fontsize=8)
    axes.spines["left"].set_visible(False)


def _box(
    axes: Axes, columns: tuple[int, int], ys: tuple[float, float], fill: Any, edge: str = "none"
) -> None:
    """A box over some columns of a grid, first and last."""
    (first, last), (top, bottom) = columns, ys
    left, right = first - 0.46, last + 0.46
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fc=fill, ec=edge, linewidth=0.5)
    )


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _dress_grid(axes: Axes, steps: list[Step], title: str, looks: dict[str, Any]) -> None:
    """A column a step."""
    _dress(axes, title, looks)
    axes.set(xlim=(0.5, len(steps) + 0.5), xticks=range(1, len(steps) + 1), yticks=[])
    axes.xaxis.tick_top()
    axes.annotate("step", (0, 1), (-4, 4), "axes fraction", "offset points", ha="right", size=8)
    axes.spines[:].set_visible(False)


def _dress(axes: Axes, title: str, looks: dict[str, Any]) -> None:
    axes.set_title(title, loc="left", fontsize=10, x=-0.105, y=1.08)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(fc=fill, ec="#9a9a9a", lw=0.6, label=name) for name, fill in looks.items()]
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1.08), ncols=len(handles),
        frameon=False, fontsize=8, borderaxespad=0, handlelength=1.2, handletextpad=0.4,
        columnspacing=1.2,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw the run, print nothing")
    args = parser.parse_args(argv)
    steps, texts = run()
    if args.output is None:
        print(listing(steps, texts))
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(steps, texts, args.output)


if __name__ == "__main__":
    main()
