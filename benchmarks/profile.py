"""Where the time of a decode step and of a prefill goes, kernel by kernel (torch.profiler).

    python -m benchmarks.profile [--batch 1 32 256] [--kv-cache-dtype fp8] [--json profile.json]

Decode: 20 steady steps of requests with about 530 tokens of context. Prefill: 16 x 1024 tokens.
Random bf16 weights in the shape of Qwen3-0.6B, temperature 0.6. Under programmatic dependent launch
a kernel that waits for the one before it counts as running; so a kernel's time is that by which it
moves the end of all before it, and the sum, "busy", is how long the GPU ran any. Rates are those of
what a group of kernels must do at least (see `work`), beside those that the machine was measured to
reach: bytes per second, and for prefill's matrix products and attention operations.
"""

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench import H200_RATES, MINIATURE, SHAPES, dummy_llm, layer_weights, measure_machine
from nanovllm import LLM, SamplingParams

# A kernel belongs to the group of the first of these parts that its name has, in lower case.
GROUPS = {
    "combine": "attention, combine",
    "flash": "attention",
    "gemm": "matrix products",
    "gemv": "matrix products",
    "_gate_up_kernel": "matrix products",
    "_down_kernel": "matrix products",
    "cutlass": "matrix products",
    "nvjet": "matrix products",
    "splitk": "matrix products",
    "split_k": "matrix products",
    "linear_pointwise": "matrix products",
    "aten::mm": "matrix products",
    "rms_norm": "norm",
    "qk_norm_rope_store": "QK-norm, RoPE, store",
    "silu_and_mul": "activation",
    "best_of": "sampling",
    "prefill": "attention",
    "decode": "attention",
    "embed": "embedding",
    "memcpy": "copies",
    "memset": "copies",
}


@dataclass
class Step:
    """What one step ran: `tokens` of `rows` requests, `contexts` tokens of context in all."""

    is_prefill: bool
    rows: int
    tokens: int
    contexts: int


@dataclass
class Kernel:
    """One line: a kernel's calls and microseconds in a step."""

    name: str
    group: str
    calls: float
    microseconds: float


def work(group: str, llm: LLM, step: Step) -> tuple[float, float]:
    """(bytes, operations) that a group of kernels cannot do without in a step; 0 if not known.

    Bytes: each input and output once. Operations only where prefill is bound by them.
    """
    config, itemsize = llm.config.model_config, llm.config.torch_dtype.itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    head = config.vocab_size * hidden
    per_token = {  # elements
        "norm": (8 * layers + 2) * hidden,  # two a layer and the last, 4 each; the first is 2
        "QK-norm, RoPE, store": 2 * layers * (q_size + 2 * kv_size),
        "activation": 3 * layers * inner,
    }
    if group in per_token:
        return per_token[group] * step.tokens * itemsize, 0
    if group == "sampling":
        return step.rows * config.vocab_size * itemsize, 0
    if group == "matrix products" and step.is_prefill:
        return 0, 2 * (layer_weights(config, 1) * step.tokens + head * step.rows)
    if group == "matrix products":
        return (layer_weights(config, step.tokens) + head) * itemsize, 0
    if group == "attention" and step.is_prefill:
        pairs = step.tokens * (step.tokens // step.rows + 1) / 2
        return 0, 4 * layers * q_size * pairs
    if group == "attention":
        return 2 * layers * kv_size * step.contexts * itemsize, 0
    return 0, 0


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, templates and arguments."""
    name = name.replace("(anonymous namespace)::", "")
    while (stripped := re.sub(r"<[^<>]*>", "", name)) != name:  # innermost templates first
        name = stripped
    name = name.split("(")[0].strip().removeprefix("void ").split("::type ")[-1]
    return name.removeprefix("at::native::")


def group_of(name: str) -> str:
    lowered = name.lower()
    return next((group for part, group in GROUPS.items() if part in lowered), "other")


def advances(spans: Sequence[tuple[float, float]]) -> list[float]:
    """By how much each (start, end) moves the latest end, gaps left out.

    The sum is the time covered, if spans end in the order in which they start, as a stream's do.
    """
    times, latest = [0.0] * len(spans), float("-inf")
    for index in sorted(range(len(spans)), key=lambda index: spans[index][::-1]):
        start, end = spans[index]
        times[index] = end - max(start, latest)
        latest = end
    return times


def profiled(function: Callable[[], None], steps: int, on_gpu: bool) -> list[Kernel]:
    """Run `function`, which does `steps` steps, and return its kernels, the slowest first.

    On a CPU, torch's operators take the kernels' place.
    """
    if on_gpu:
        torch.cuda.synchronize()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    events = [
        event
        for event in profiler.events()
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu
    ]
    if on_gpu:
        times = advances([(event.time_range.start, event.time_range.end) for event in events])
    else:
        times = [event.self_cpu_time_total for event in events]
    for event, time_of_event in zip(events, times, strict=True):
        name = short_name(event.name)
        calls[name] += 1
        microseconds[name] += time_of_event
    kernels = [
        Kernel(name, group_of(name), calls[name] / steps, microseconds[name] / steps)
        for name in calls
    ]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def decode(llm: LLM, batch: int, context: int, steps: int) -> tuple[Step, list[Kernel], float]:
    """The mean of `steps` decode steps: what ran, its kernels, and seconds without the profiler."""
    params = SamplingParams(temperature=0.6, max_tokens=4 * steps + 16, ignore_eos=True)
    for _ in range(batch):
        llm.add_request(_prompt(llm, context - steps), params)
    past_capture = llm.stats.decode_tokens + 4 * batch
    while llm.stats.decode_tokens < past_capture:
        llm.step()

    def run() -> None:
        for _ in range(steps):
            llm.step()

    start = time.perf_counter()
    run()
    seconds = (time.perf_counter() - start) / steps
    before = _running_tokens(llm)
    kernels = profiled(run, steps, llm.config.torch_device.type == "cuda")
    contexts = (before + _running_tokens(llm)) // 2
    llm.abort_all()
    return Step(False, batch, batch, contexts), kernels, seconds


def prefill(llm: LLM, requests: int, length: int) -> tuple[Step, list[Kernel], float]:
    """A prefill of `requests` prompts: what ran, its kernels, and seconds without the profiler."""

    def run() -> None:
        prompts = [_prompt(llm, length) for _ in range(requests)]
        llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=1), use_tqdm=False)

    run()
    before = llm.stats.prefill_seconds
    run()
    seconds = llm.stats.prefill_seconds - before
    kernels = profiled(run, 1, llm.config.torch_device.type == "cuda")
    return Step(True, requests, requests * length, requests * length), kernels, seconds


def _prompt(llm: LLM, length: int) -> list[int]:
    return random.choices(range(llm.config.model_config.vocab_size), k=length)


def _running_tokens(llm: LLM) -> int:
    return sum(seq.num_tokens for seq in llm.scheduler.running)


def report(
    title: str, llm: LLM, step: Step, kernels: list[Kernel], seconds: float,
    rates: tuple[float, float],
) -> dict[str, object]:  # fmt: skip
    """Print a step's tables, and return the figures in them."""
    busy = sum(kernel.microseconds for kernel in kernels)
    calls = sum(kernel.calls for kernel in kernels)
    print(f"\n### {title}: {1e6 * seconds:,.0f} us, busy {busy:,.0f} us in {calls:.0f} kernels\n")
    print("| kernel | group | calls | us a call | us | share |\n|---|---|---|---|---|---|")
    for kernel in kernels:
        if kernel.microseconds < busy / 1000:
            continue
        each = kernel.microseconds / kernel.calls
        print(
            f"| {kernel.name} | {kernel.group} | {kernel.calls:.4g} | {each:.2f} "
            f"| {kernel.microseconds:.1f} | {100 * kernel.microseconds / busy:.1f}% |"
        )
    print(
        "\n| group | us | share | at least | rate | of the machine's |\n|---|---|---|---|---|---|"
    )
    groups = []
    for group in dict.fromkeys(kernel.group for kernel in kernels):
        us = sum(kernel.microseconds for kernel in kernels if kernel.group == group)
        num_bytes, ops = work(group, llm, step)
        rate = (num_bytes or ops) / us * 1e6
        reached = rate / (rates[0] if num_bytes else rates[1])
        groups.append({"group": group, "microseconds": us, "bytes": num_bytes, "operations": ops})
        cells = f"| {group} | {us:.1f} | {100 * us / busy:.1f}% "
        if num_bytes:
            cells += (
                f"| {num_bytes / 1e6:,.1f} MB | {rate / 1e9:,.0f} GB/s | {100 * reached:.0f}% |"
            )
        elif ops:
            cells += f"| {ops / 1e12:.3g} Tops | {rate / 1e12:,.0f} Tops/s | {100 * reached:.0f}% |"
        else:
            cells += "| | | |"
        print(cells)
    return {
        "title": title, "seconds": seconds, "busy_microseconds": busy, "step": asdict(step),
        "kernels": [asdict(kernel) for kernel in kernels], "groups": groups,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--context", type=int, default=530)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prefill", type=int, nargs=2, default=[16, 1024], metavar=("N", "LEN"))
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", choices=["fp8"], help="of the weights")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--tiny", action="store_true", help="a miniature, to try the script out")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("there is no CUDA GPU here: try the script out with --tiny")
    if args.steps < 1 or args.context <= 2 * args.steps:
        parser.error("--steps must be at least 1, and --context more than twice as long")
    random.seed(0)
    options = {
        "attention_backend": args.attention_backend, "kv_cache_dtype": args.kv_cache_dtype,
        "quantization": args.quantization,
    }  # fmt: skip
    with dummy_llm(args.shape, MINIATURE if args.tiny else {}, **options) as llm:
        tables = [
            (f"decode, batch {batch}, context {args.context}",
             *decode(llm, batch, args.context, args.steps))
            for batch in args.batch
        ]  # fmt: skip
        number, length = args.prefill
        tables.append((f"prefill, {number} x {length}", *prefill(llm, number, length)))
    device = llm.config.torch_device
    rates = H200_RATES if args.tiny else measure_machine(device)
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch "
        f"{torch.__version__}, {rates[0] / 1e12:.2f} TB/s, {rates[1] / 1e12:.0f} TFLOP/s"
    )
    reports = [report(title, llm, *figures, rates) for title, *figures in tables]
    if args.json:
        Path(args.json).write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
