"""The GPU workloads in one call, each beside its floor.

    python -m benchmarks.gpu                        # all but the last five: 90 s
    python -m benchmarks.gpu --all --json gpu.json  # benchmarks.plot draws from that file
    python -m benchmarks.gpu --engine vllm transformers
    python -m benchmarks.gpu --engine nano-vllm --engine-path path/to/nano-vllm

mix      256 requests, 100 to 1024 tokens in, 100 to 1024 out: seconds of the call
batch    1 and 32 requests, 128 in, 512 out: the mean decode step
prefill  64 requests, 1024 in, 1 out: seconds of the call
ready    the imports of torch and nanovllm, one after the other, `LLM(...)` on a real checkpoint
         (which imports transformers, for the tokenizer) and a first request of 16 tokens, in a
         fresh process: once with the caches of Triton and of Python's bytecode empty, then with
         both full. The checkpoint is in the page cache. The first request is not counted in.
host     what the host does for a decode step: schedule, launch and postprocess, without waiting
options  256 requests, 128 in, 256 out, with sampling options: all of them, or one
scaling  the mean decode step by batch, by context, and of larger models
rollout  32 prompts of 512, 16 completions each, 1024 out, temperature 1: seconds of the call
prefix   256 requests, 2048 in that all share and 100 of their own, 128 out: seconds of the call
common   64 requests, 16384 in that all share and 100 of their own, 128 out: the mean decode step

All with random bf16 weights in the shape of Qwen3-0.6B unless said otherwise, temperature 0.6, no
end-of-sequence, other tokens in each run so that no prefix is in the cache; medians of `--runs`
runs after one that warms up. A mean decode step is the time from the tokens of the last prefill
step to those of the last decode step (`llm.stats`), over the number of decode steps; for another
engine it is the seconds of the call, less those of a call with one token out, over the tokens after
the first. The floor is bench.py's, once with the rates measured here and once with the fixed rates
of an H200, so that figures of different days compare.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench import (
    H200_RATES,
    MINIATURE,
    SHAPES,
    Workload,
    dummy_llm,
    floor_seconds,
    measure_machine,
    run,
)
from benchmarks.host import host_seconds
from benchmarks.peers import ENGINES, MAX_MODEL_LEN, TEMPERATURE, time_calls
from benchmarks.ready import STAGES, seconds_to_ready, write_checkpoint
from nanovllm import LLM, __version__
from nanovllm.config import Config

EXTRA_PARTS = (
    "options",
    "scaling",
    "rollout",
    "prefix",
    "common",
)  # nanovllm's alone, if asked for
PARTS = ("mix", "batch", "prefill", "ready", "host", *EXTRA_PARTS)
OPTIONS: dict[str, dict[str, Any]] = {
    "no": {},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    "logit_bias": {"logit_bias": {5: 1.0, 7: -3.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(500))},
    "top_k and top_p": {"top_k": 20, "top_p": 0.8},
    "logprobs": {"logprobs": 5},
}
UNITS = {"s": 1, "ms/step": 1e3, "us/step": 1e6}


@dataclass(frozen=True)
class Sizes:
    """How large everything is; lengths are (prompt, output) unless they are ranges."""

    mix: tuple[int, tuple[int, int], tuple[int, int]] = (256, (100, 1024), (100, 1024))
    batches: tuple[int, ...] = (1, 32)
    batch_len: tuple[int, int] = (128, 512)
    prefill: tuple[int, int] = (64, 1024)
    options: tuple[int, int, int] = (256, 128, 256)
    host_batches: tuple[int, ...] = (1, 32, 256, 512)
    host_steps: int = 64
    scaling_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    scaling_len: tuple[int, int] = (128, 128)
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    context_batch: int = 8
    context_output: int = 33
    shapes: tuple[str, ...] = ("qwen3-4b", "qwen3-8b")
    shape_batches: tuple[int, ...] = (1, 64)
    rollout: tuple[int, int, int, int] = (32, 512, 16, 1024)  # prompts, length, n, output
    prefix: tuple[int, int, int, int] = (256, 2048, 100, 128)  # requests, shared, own, output
    common: tuple[int, int, int, int] = (64, 16384, 100, 128)


TINY = Sizes(
    mix=(4, (5, 20), (3, 8)), batch_len=(8, 4), prefill=(4, 32), host_batches=(1, 4), host_steps=3,
    scaling_batches=(1, 2, 4), scaling_len=(8, 4), contexts=(16, 32, 64), context_batch=2,
    context_output=4, options=(4, 8, 4), shapes=("qwen3-4b",), shape_batches=(1, 2),
    rollout=(2, 20, 3, 4), prefix=(4, 64, 5, 4), common=(3, 128, 4, 4),
)  # fmt: skip


@dataclass
class Case:
    """A workload, and what is measured of it: the whole call, or its mean decode step.

    The first `prefix_len` tokens of each prompt are one of `num_prefixes`; it has `n` completions.
    """

    part: str
    name: str
    workload: Workload
    per_step: bool = True
    tokens: int = 0  # in what is measured: output tokens, or those of the prompts
    options: list[dict[str, Any]] = field(default_factory=list)  # of the first requests
    temperature: float = TEMPERATURE
    prefix_len: int = 0
    num_prefixes: int = 1
    n: int = 1

    @classmethod
    def decode(cls, part: str, batch: int, input_len: int, output_len: int, name: str) -> "Case":
        workload = Workload.draw(batch, (input_len,) * 2, (output_len,) * 2, 10**5, seed=1)
        return cls(part, name, workload, tokens=batch)

    @property
    def most_cached(self) -> int:
        """Tokens that prompts may find in the cache."""
        return self.prefix_len * (len(self.workload.prompts) - self.num_prefixes)

    def floor(self, config: Config, rates: tuple[float, float]) -> float:
        """Least seconds."""
        workload = Workload(self.workload.prompts * self.n, self.workload.output_lens * self.n)
        prefixes = self.prefix_len, self.num_prefixes
        seconds = floor_seconds(config, workload, *rates, *prefixes)
        if not self.per_step:
            return sum(seconds.values())
        steps = max(workload.output_lens) - 1
        return (seconds["weights"] + seconds["keys_and_values"]) / steps


@dataclass
class Row:
    """One line of the table. Times are in seconds, `runs` each the one of a run."""

    part: str
    name: str
    engine: str
    unit: str
    runs: list[float]
    batch: int | None = None
    input_len: int | None = None
    tokens_per_second: float | None = None
    floor: float | None = None
    h200_floor: float | None = None
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return statistics.median(self.runs)

    def cells(self) -> list[str]:
        scale = UNITS[self.unit]
        cells = [self.name, self.engine, f"{self.seconds * scale:.4g} {self.unit}"]
        cells.append(f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else "")
        for floor in (self.floor, self.h200_floor):
            share = f" ({100 * floor / self.seconds:.0f}%)" if floor else ""
            cells.append(f"{floor * scale:.3g}{share}" if floor else "")
        return cells


class Bench:
    """Runs the parts, and keeps their rows."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        self.start = time.perf_counter()
        self.sizes = TINY if args.tiny else Sizes()
        self.changes = MINIATURE if args.tiny else {}
        self.options = {
            "attention_backend": args.attention_backend,
            "tensor_parallel_size": args.tensor_parallel_size,
            "kv_cache_dtype": args.kv_cache_dtype,
            "quantization": args.quantization,
            "max_model_len": MAX_MODEL_LEN,
        }
        self.directory = directory
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows: list[Row] = []
        self.versions = {"nanovllm": __version__}
        self.renewals = count()  # no two runs have the same tokens
        self.rates = H200_RATES if args.tiny else measure_machine(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def progress(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.1f} s] {text}", file=sys.stderr)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.progress(": ".join(row.cells()[:3]))

    def cases(self, parts: list[str]) -> Iterator[Case]:
        """The workloads that any engine runs, with its defaults."""
        if "mix" in parts:
            workload = Workload.draw(*self.sizes.mix, 10**5, seed=0)
            yield Case("mix", "mix", workload, False, sum(workload.output_lens))
        if "batch" in parts:
            for batch in self.sizes.batches:
                yield Case.decode("batch", batch, *self.sizes.batch_len, f"batch {batch}")
        if "prefill" in parts:
            number, length = self.sizes.prefill
            workload = Workload.draw(number, (length,) * 2, (1, 1), 10**5, seed=1)
            yield Case("prefill", "prefill", workload, False, number * length)
        if "options" in parts:
            yield from self.option_cases()
        if "scaling" in parts:
            for batch in self.sizes.scaling_batches:
                name = f"scaling: batch {batch}"
                yield Case.decode("by batch", batch, *self.sizes.scaling_len, name)
        if "rollout" in parts:
            number, length, n, output_len = self.sizes.rollout
            workload = Workload.draw(number, (length,) * 2, (output_len,) * 2, 10**5, seed=1)
            yield Case(
                "rollout", "rollout", workload, False, number * n * output_len,
                [{"n": n}] * number, 1.0, length, number, n,
            )  # fmt: skip
        if "prefix" in parts:
            yield self.prefix_case("prefix", per_step=False)

    def prefix_case(self, part: str, per_step: bool) -> Case:
        number, shared, own, output_len = getattr(self.sizes, part)
        lens = (own, own), (output_len, output_len)
        workload = Workload.draw(number, *lens, 10**5, seed=1, prefix_len=shared)
        tokens = number * (1 if per_step else output_len)
        return Case(part, part, workload, per_step, tokens, prefix_len=shared)

    def option_cases(self) -> Iterator[Case]:
        number, input_len, output_len = self.sizes.options
        workload = Workload.draw(number, (input_len,) * 2, (output_len,) * 2, 10**5, seed=1)
        for name, options in (OPTIONS | {"min_tokens": {"min_tokens": output_len}}).items():
            for rows in (number, 1) if options else (number,):
                title = f"options: {name}" + (f" in {rows}" if options else "")
                tokens = number * output_len
                yield Case("options", title, workload, False, tokens, [options] * rows)

    def llm(self, shape: str | None = None, **options: Any) -> LLM:
        options = self.options | options
        return dummy_llm(shape or self.args.shape, self.changes, **options)

    def renewed(self, case: Case, vocab_size: int) -> Workload:
        return case.workload.renewed(next(self.renewals), vocab_size)

    def measure(self, llm: LLM, case: Case) -> None:
        """Run a case on nanovllm, and add its row."""
        seconds = []
        for _ in range(self.args.runs + 1):
            workload = self.renewed(case, llm.config.model_config.vocab_size)
            result = run(llm, workload, case.temperature, use_tqdm=False, options=case.options)
            if result["cached_tokens"] > case.most_cached:
                raise RuntimeError(f"{case.name}: the prefix cache helped; the figure is worthless")
            if case.per_step:
                steps = result["decode_tokens"] / len(workload.prompts)
                seconds.append(result["decode_seconds"] / steps)
            else:
                seconds.append(result["seconds"])
        self.add(self.row(case, "nanovllm", seconds[1:], llm.config))

    def row(self, case: Case, engine: str, seconds: list[float], config: Config) -> Row:
        return Row(
            case.part, case.name, engine, "ms/step" if case.per_step else "s", seconds,
            len(case.workload.prompts), max(map(len, case.workload.prompts)),
            case.tokens / statistics.median(seconds), case.floor(config, self.rates),
            case.floor(config, H200_RATES),
        )  # fmt: skip

    def nanovllm(self, parts: list[str]) -> None:
        if "ready" in parts:
            self.ready()
        if set(parts) - {"ready", "common"}:
            with self.llm() as llm:
                for case in self.cases(parts):
                    self.measure(llm, case)
                if "host" in parts:
                    self.host(llm)
        if "scaling" in parts:
            self.scaling()
        if "common" in parts:
            with self.llm(max_model_len=sum(self.sizes.common[1:])) as llm:
                self.measure(llm, self.prefix_case("common", per_step=True))

    def scaling(self) -> None:
        """By context and by model; by batch is among `cases`."""
        sizes = self.sizes
        with self.llm(max_model_len=max(sizes.contexts) + sizes.context_output) as llm:
            for context in sizes.contexts:
                name = f"scaling: batch {sizes.context_batch}, context {context}"
                shape = (sizes.context_batch, context, sizes.context_output)
                self.measure(llm, Case.decode("by context", *shape, name))
        for shape in sizes.shapes:
            with self.llm(shape) as llm:
                for batch in sizes.shape_batches:
                    name = f"scaling: {shape}, batch {batch}"
                    self.measure(llm, Case.decode("by model", batch, *sizes.scaling_len, name))

    def ready(self) -> None:
        model = self.checkpoint()
        with tempfile.TemporaryDirectory() as caches:
            for state, runs in (("cold", 1), ("warm", self.args.runs)):
                times = [seconds_to_ready(model, self.options, caches) for _ in range(runs)]
                ready = [sum(stages[:-1]) for stages in times]
                self.add(Row("ready", f"ready, {state}", "nanovllm", "s", ready))
                for stage, seconds in zip(STAGES, zip(*times, strict=True), strict=True):
                    name = f"ready, {state}: {stage}"
                    self.add(Row("ready", name, "nanovllm", "s", list(seconds)))

    def host(self, llm: LLM) -> None:
        for batch in self.sizes.host_batches:
            case = Case.decode("host", batch, self.sizes.scaling_len[0], 1, "")
            prompts = self.renewed(case, llm.config.model_config.vocab_size).prompts
            detail = host_seconds(llm, prompts, self.sizes.host_steps)
            parts = " + ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in detail.items())
            name, runs = f"host, batch {batch} ({parts})", [sum(detail.values())]
            self.add(Row("host", name, "nanovllm", "us/step", runs, batch, detail=detail))

    def checkpoint(self) -> Path:
        """A real checkpoint, written once."""
        path = self.directory / "model"
        if not path.exists():
            self.progress("writing a checkpoint")
            write_checkpoint(path, self.args.shape, self.changes, self.device)
        return path

    def peer(self, engine: str, parts: list[str]) -> None:
        """The workloads with another engine; one line if it cannot run."""
        cases, runs = list(self.cases(parts)), self.args.runs + 1
        config = Config.from_options(self.checkpoint(), {"max_model_len": MAX_MODEL_LEN})
        calls = []
        for case in cases:
            output_lens = case.workload.output_lens
            of_a_run = [output_lens, [1] * len(output_lens)] if case.per_step else [output_lens]
            for lens in of_a_run * runs:
                prompts = self.renewed(case, config.model_config.vocab_size).prompts
                calls.append({"prompts": prompts, "output_lens": lens})
        self.progress(f"starting {engine}")
        engine_path = self.args.engine_path if engine == "nano-vllm" else None
        try:
            result = time_calls(engine, self.checkpoint(), calls, engine_path)
        except RuntimeError as error:
            self.progress(str(error))
            return
        self.versions[engine] = result["version"]
        self.add(Row("ready", "ready: import and LLM(...)", engine, "s", [result["ready"]]))
        seconds = iter(result["seconds"])
        for case in cases:
            measured = [next(seconds) for _ in range(runs * (1 + case.per_step))]
            if case.per_step:
                steps = max(case.workload.output_lens) - 1
                pairs = zip(measured[::2], measured[1::2])
                measured = [(whole - first) / steps for whole, first in pairs]
            self.add(self.row(case, engine, measured[1:], config))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument(
        "--scaling", "--all", action="store_true", help="all parts, also those of nanovllm alone"
    )
    engines = ["nanovllm", *ENGINES]
    parser.add_argument("--engine", nargs="+", choices=engines, default=["nanovllm"])
    parser.add_argument("--engine-path", metavar="DIR", help="where nano-vllm's repository is")
    parser.add_argument("--runs", type=int, default=3, help="counted, after one that warms up")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="of all but scaling")
    parser.add_argument("--attention-backend", default="auto", help="of nanovllm")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="of nanovllm")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of nanovllm")
    parser.add_argument("--quantization", choices=["fp8"], help="of nanovllm's weights")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--tiny", action="store_true", help="a miniature of all, to try it out")
    args = parser.parse_args(argv)
    args.parts = args.only or [p for p in PARTS if p not in EXTRA_PARTS or args.scaling]
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if "nano-vllm" in args.engine and not Path(args.engine_path or "?", "nanovllm").is_dir():
        parser.error("--engine nano-vllm needs --engine-path: the directory of its repository")
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("there is no CUDA GPU here: try the script out with --tiny")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, Path(directory))
        for engine in args.engine:
            if engine == "nanovllm":
                bench.nanovllm(args.parts)
            else:
                bench.peer(engine, [p for p in args.parts if p not in EXTRA_PARTS])
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU, miniature"
    read_rate, matmul_rate = bench.rates
    print(
        f"{args.tensor_parallel_size} x {name}, torch {torch.__version__}; {bench.versions}; "
        f"{args.shape}; medians of {args.runs} runs\n"
        f"floors by the rates measured here, {read_rate / 1e12:.2f} TB/s and "
        f"{matmul_rate / 1e12:.0f} TFLOP/s, and by an H200's, {H200_RATES[0] / 1e12:.2f} TB/s and "
        f"{H200_RATES[1] / 1e12:.0f} TFLOP/s\n"
    )
    headings = ["workload", "engine", "median", "tok/s", "floor (reached)", "by an H200's rates"]
    print("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
    for row in bench.rows:
        print("| " + " | ".join(row.cells()) + " |")
    if args.json:
        report = {
            "device": name, "torch": torch.__version__, "versions": bench.versions,
            "read_bytes_per_second": read_rate, "matmul_ops_per_second": matmul_rate,
            "h200_rates": H200_RATES, "options": vars(args),
            "rows": [asdict(row) | {"seconds": row.seconds} for row in bench.rows],
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
