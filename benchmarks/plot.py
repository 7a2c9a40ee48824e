"""Draws the README's picture from the figures of `benchmarks.gpu --all --json FILE`.

    python -m benchmarks.plot FILE [docs/scaling.png]

Two panels: the mean decode step by batch and by context, each beside its floor: by the fixed rates
of an H200 if it ran on one, as in the README's tables, else by the rates measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

MEASURED, FLOOR = "#1f5fa8", "#8a8a8a"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture to `path`.

    Raises:
        ValueError: if the report has no figures of the part "scaling".
    """
    by_batch, by_context = (
        [row for row in report["rows"] if row["part"] == part and row["engine"] == "nanovllm"]
        for part in ("by batch", "by context")
    )
    if not by_batch or not by_context:
        raise ValueError("the report has no scaling figures: run benchmarks.gpu with --all")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    floor = "h200_floor" if "H200" in report["device"] else "floor"
    _panel(left, by_batch, "batch", floor)
    left.set_title(f"by batch, {by_batch[0]['input_len']} tokens in", fontsize=10)
    left.set(xlabel="requests at a time", ylabel="one decode step, ms")
    _panel(right, by_context, "input_len", floor)
    right.set_title(f"by context, batch {by_context[0]['batch']}", fontsize=10)
    right.set(xlabel="tokens of context")
    left.legend(loc="upper left", frameon=False, fontsize=9)
    figure.suptitle(f"Qwen3-0.6B's shape in bf16 on one {report['device']}", fontsize=12)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str, floor_key: str) -> None:
    x = [row[key] for row in rows]
    measured = [1e3 * row["seconds"] for row in rows]
    floor = [1e3 * row[floor_key] for row in rows]
    axes.fill_between(x, floor, measured, color=MEASURED, alpha=0.08, linewidth=0)
    label = "nanovllm, in % of the floor's speed"
    axes.plot(x, measured, "o-", color=MEASURED, label=label, markersize=4.5)
    axes.plot(x, floor, "--", color=FLOOR, label="floor: bytes over bandwidth")
    for at, time, least in zip(x, measured, floor):
        axes.annotate(
            f"{100 * least / time:.0f}%", (at, time), xytext=(-5, 6), textcoords="offset points",
            ha="center", fontsize=7.5, color=MEASURED,
        )  # fmt: skip
    axes.margins(x=0.08)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{n // 1024}k" if n >= 1024 else str(n) for n in x])
    axes.set_ylim(0.8 * min(floor), 1.6 * max(measured))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("report", type=Path, help="written by benchmarks.gpu")
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/scaling.png"))
    args = parser.parse_args(argv)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw(json.loads(args.report.read_text()), args.picture)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
