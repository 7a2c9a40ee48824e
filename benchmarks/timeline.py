"""One run of an engine over time: throughput, batch size and KV cache, as `bench.py --plot` draws.

What is drawn is noted after each step: a few numbers that are there anyway, in 3 microseconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from nanovllm import LLM
from nanovllm.engine.scheduler import Batch
from nanovllm.outputs import RequestOutput

PREFILL, DECODE, WAITING, CACHE, PREEMPTION = "#d9730d", "#1f5fa8", "#7a7a7a", "#2f8f6b", "#c0271d"
MOST_BARS = 300  # of throughput: a long step has its own, short ones share one


class Moment(NamedTuple):
    """An engine after a step; tokens and preemptions are those since it was built."""

    time: float
    prefill_tokens: int
    decode_tokens: int
    running: int  # in the step, those that it ended included
    waiting: int
    blocks: int  # the most in use at once since the moment before
    preemptions: int


@contextmanager
def recorded(llm: LLM) -> Iterator[list[Moment]]:
    """The moments of an engine: one at the start of the block, and one after each step in it."""
    step, scheduler, schedule = llm.step, llm.scheduler, llm.scheduler.schedule
    cache, fewest_free = scheduler.block_manager, scheduler.block_manager.fewest_free
    moments: list[Moment] = []
    running = 0

    def recorded_schedule() -> Batch | None:
        nonlocal running
        batch = schedule()
        running = len(scheduler.running)
        return batch

    def note() -> None:
        moments.append(
            Moment(
                perf_counter(), llm.stats.prefill_tokens, llm.stats.decode_tokens,
                running, len(scheduler.waiting),
                len(cache.blocks) - cache.fewest_free, scheduler.num_preemptions,
            )
        )  # fmt: skip
        cache.fewest_free = cache.num_free_blocks

    def recorded_step() -> list[RequestOutput]:
        outputs = step()
        note()
        return outputs

    cache.fewest_free = cache.num_free_blocks
    note()
    llm.step, scheduler.schedule = recorded_step, recorded_schedule
    try:
        yield moments
    finally:
        del llm.step, scheduler.schedule  # those of the classes are back
        most = max(moment.blocks for moment in moments)
        cache.fewest_free = min(fewest_free, len(cache.blocks) - most)


def draw(moments: list[Moment], num_blocks: int, title: str, path: Path) -> None:
    """Write the picture of a recorded run to `path`, as PNG."""
    run = Moment(*(np.array(column) for column in zip(*moments)))
    ends = run.time - run.time[0]  # of the steps; the first entry is the start
    figure, panels = plt.subplots(
        3, 1, figsize=(9, 6.6), sharex=True, layout="constrained", height_ratios=(1.2, 1, 1)
    )
    _draw_throughput(panels[0], ends, run)
    _draw_batch(panels[1], ends, run)
    _draw_cache(panels[2], ends, run, num_blocks)
    panels[-1].set(xlim=(0, ends[-1]), xlabel="seconds")
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, format="png", dpi=160)
    plt.close(figure)


def _draw_throughput(axes: Axes, ends: np.ndarray, run: Moment) -> None:
    right = axes.twinx()  # prefill is often ten times as fast: it has a scale of its own
    right.spines["top"].set_visible(False)
    edges = bar_edges(ends, np.diff(run.prefill_tokens) > 0)
    handles = []
    for panel, tokens, color, name in (
        (axes, run.decode_tokens, DECODE, "decode"),
        (right, run.prefill_tokens, PREFILL, "prefill"),
    ):
        rates = np.diff(tokens[edges]) / np.diff(ends[edges])
        rates[rates == 0] = np.nan  # no line along the bottom
        handles.append(_area(panel, rates, ends[edges], color, name))
        panel.set_ylim(0, 1.1 * np.nanmax([1, *rates]))
        panel.set_ylabel(f"{name}, tok/s", color=color)
        panel.tick_params(axis="y", labelcolor=color)
        panel.yaxis.set_major_formatter("{x:,.0f}")
        if np.isnan(rates).all():
            panel.set_yticks([])
    _dress(axes, "throughput", [*handles, _shade_prefill(axes, ends, run)])


def bar_edges(ends: np.ndarray, is_prefill: np.ndarray) -> list[int]:
    """Which of `ends` end a bar: a bar has whole steps, of one kind where they last long enough."""
    width = ends[-1] / MOST_BARS
    last = np.append(np.flatnonzero(np.diff(is_prefill)), len(is_prefill) - 1)  # of its kind
    phase_ends = ends[1:][last[np.searchsorted(last, np.arange(len(is_prefill)))]]
    edges = [0]
    for index, phase_end in enumerate(phase_ends, start=1):
        is_long = ends[index] - ends[edges[-1]] >= width
        if is_long and not 0 < phase_end - ends[index] < width:  # leave no splinter
            edges.append(index)
    if edges[-1] < len(is_prefill):
        edges.append(len(is_prefill))
    return edges


def _draw_batch(axes: Axes, ends: np.ndarray, run: Moment) -> None:
    running = _area(axes, run.running[1:], ends, DECODE, "running")
    waiting = axes.stairs(run.waiting[1:], ends, color=WAITING, linewidth=1.1, label="waiting")
    _shade_prefill(axes, ends, run)
    _dress(axes, "batch size, in sequences", [running, waiting])
    axes.set_ylim(0, 1.1 * max(1, run.running.max(), run.waiting.max()))


def _draw_cache(axes: Axes, ends: np.ndarray, run: Moment, num_blocks: int) -> None:
    share, starts = 100 * run.blocks[1:] / num_blocks, ends[:-1]
    peak = int(np.argmax(share))
    _area(axes, share, ends, CACHE)
    (dot,) = axes.plot(
        starts[peak], share[peak], "o", color=CACHE, markersize=5, clip_on=False,
        label=f"peak {share[peak]:.3g}%",
    )  # fmt: skip
    handles = [dot]
    preempted = np.flatnonzero(np.diff(run.preemptions))
    if len(preempted):
        handles += axes.plot(
            starts[preempted], np.full(len(preempted), 109), "v", color=PREEMPTION, markersize=5,
            markeredgewidth=0, label=f"preemption ({run.preemptions[-1] - run.preemptions[0]})",
        )  # fmt: skip
    _shade_prefill(axes, ends, run)
    _dress(axes, f"KV cache in use, % of {num_blocks:,} blocks", handles)
    axes.set(ylim=(0, 118), yticks=range(0, 101, 25))


def _area(
    axes: Axes, values: np.ndarray, edges: np.ndarray, color: str, label: str | None = None
) -> Artist:
    axes.stairs(values, edges, fill=True, color=color, alpha=0.22, linewidth=0)
    return axes.stairs(values, edges, color=color, linewidth=1.1, label=label)


def _shade_prefill(axes: Axes, ends: np.ndarray, run: Moment) -> Artist:
    steps = np.flatnonzero(np.diff(run.prefill_tokens))
    return axes.broken_barh(
        list(zip(ends[steps], np.diff(ends)[steps])), (0, 1), color=PREFILL, alpha=0.2,
        linewidth=0, zorder=0.5, transform=axes.get_xaxis_transform(), label="prefill step",
    )  # fmt: skip


def _dress(axes: Axes, title: str, handles: list[Artist]) -> None:
    """What all panels share; the legend stands above, beside the title, where nothing is drawn."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(handles),
        frameon=False, fontsize=9, borderaxespad=0, handlelength=1.3,
        handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
