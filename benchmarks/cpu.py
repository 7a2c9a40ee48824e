"""nanovllm beside other engines on a CPU: Qwen3-0.6B's shape, random bf16 weights, greedy.

    python -m benchmarks.cpu [--engine transformers] [--engine llama.cpp] [--runs 5] [--threads N]

All engines hold the same weights (llama.cpp in BF16, and once more in Q8_0) and run in this one
process, in turns, with fresh prompts each time. Of one prompt of 100 tokens, and of eight of 20 to
200 (transformers gets them as one left-padded batch), each engine generates 1 token, and then 49:
what the second call takes longer is 48 decode steps. Four prompts of 256 tokens get 1 token each.
Medians are printed, with "x" how many times as fast as the other engine nanovllm is: the median of
pairs run one after the other.

A decode step reads the weights at least. A plain sum of as many bytes is timed among the engines.
"""

import argparse
import importlib.util
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import write_shape
from nanovllm import LLM, SamplingParams

NUM_STEPS = 48
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], object]  # so many tokens for each prompt


class Workload(NamedTuple):
    name: str
    input_lens: list[int]
    num_steps: int  # of decode


WORKLOADS = [
    Workload("1 request", [100], NUM_STEPS),
    Workload("8 requests", [20, 46, 72, 97, 123, 149, 174, 200], NUM_STEPS),
    Workload("4 prompts", [256] * 4, 0),
]


class Times(NamedTuple):
    """Seconds of one turn of an engine: to the first tokens, and of each decode step after."""

    first: float
    step: float


def make_engines(others: list[str], directory: Path, threads: int) -> dict[str, Generate]:
    """All engines by name, nanovllm first, with the same weights."""
    write_shape("qwen3-0.6b", str(directory))
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    llm = LLM(directory, device="cpu", max_model_len=4096)
    engines: dict[str, Generate] = {"nanovllm": lambda *call: nanovllm_generate(llm, *call)}
    if "llama.cpp" in others:
        from benchmarks.llama_cpp import WEIGHT_TYPES, LlamaCpp, write_model

        for weight_type in WEIGHT_TYPES:
            path = directory / f"{weight_type}.gguf"
            write_model(path, config, model.state_dict(), weight_type)
            engines[f"llama.cpp {weight_type}"] = LlamaCpp(path, threads).generate
    if "transformers" in others:
        engines["transformers"] = lambda *call: transformers_generate(model, *call)
    return engines


def nanovllm_generate(llm: LLM, prompts: Prompts, output_len: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)


def transformers_generate(model: torch.nn.Module, prompts: Prompts, output_len: int) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generate(
        ids, attention_mask=mask, max_new_tokens=output_len, min_new_tokens=output_len,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def measure(generate: Generate, workload: Workload, rng: random.Random) -> Times:
    seconds = []
    for output_len in (1, 1 + workload.num_steps):
        if output_len > 1 or not seconds:
            prompts = [[rng.randrange(1, 10000) for _ in range(n)] for n in workload.input_lens]
            seconds.append(timed(lambda: generate(prompts, output_len)))  # noqa: B023
    return Times(seconds[0], (seconds[-1] - seconds[0]) / max(workload.num_steps, 1))


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(workload: Workload, times: dict[str, list[Times]], read: float) -> Iterator[str]:
    """A line for each engine; `read` is the seconds that a plain read of the weights takes."""
    tokens, rows = sum(workload.input_lens), len(workload.input_lens)
    for engine, turns in times.items():
        pairs = [*zip(turns, times["nanovllm"])]
        parts = [f"prompts {tokens / median(t.first for t in turns):6.1f} tok/s"]
        ratios = [median(t.first / own.first for t, own in pairs)]
        if workload.num_steps:
            step = median(t.step for t in turns)
            total = [t.first + workload.num_steps * t.step for t in turns]
            own_total = [t.first + workload.num_steps * t.step for t in times["nanovllm"]]
            rate = rows * (1 + workload.num_steps) / median(total)
            parts += [f"a step {step * 1e3:6.1f} ms ({read / step:4.0%} of a plain read)"]
            parts += [f"generated {rate:5.1f} tok/s"]
            ratios += [median(t.step / own.step for t, own in pairs)]
            ratios += [median(t / own for t, own in zip(total, own_total))]
        line = ", ".join(f"{part} x{ratio:.2f}" for part, ratio in zip(parts, ratios))
        yield f"{workload.name:10}  {engine:14}  {line}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--engine", choices=["transformers", "llama.cpp"], action="append", help="may be repeated"
    )
    parser.add_argument("--runs", type=int, default=5, help="after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if "llama.cpp" in (args.engine or []) and missing:
        parser.error(
            "--engine llama.cpp needs: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python "
            f"gguf; not installed: {', '.join(missing)}"
        )
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        engines = make_engines(args.engine or ["transformers"], Path(directory), args.threads)
    weights = torch.ones(596_049_920 // 4, dtype=torch.int64)  # as many bytes in bf16
    print(f"{args.threads} threads, torch {torch.__version__}, medians of {args.runs}")
    rng = random.Random(0)
    for workload in WORKLOADS:
        reads: list[float] = []
        times: dict[str, list[Times]] = {engine: [] for engine in engines}
        for run in range(args.runs + 1):
            for engine, generate in engines.items():
                found = measure(generate, workload, rng)
                read = min(timed(weights.sum) for _ in range(3))
                if run:
                    times[engine].append(found)
                    reads.append(read)
        for line in report(workload, times, median(reads)):
            print(line, flush=True)
        rate = weights.nbytes / median(reads) / 1e9
        print(f"a plain read of the weights: {median(reads) * 1e3:.1f} ms, {rate:.1f} GB/s")


if __name__ == "__main__":
    main()
