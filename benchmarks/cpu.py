"""nanovllm beside transformers' `generate` on a CPU: Qwen3-0.6B's shape, random bf16 weights.

    python -m benchmarks.cpu [--runs 3] [--threads N]

Two workloads, greedy, 48 tokens each: eight ragged prompts of 20 to 200 tokens (transformers gets
them as one left-padded batch), and one prompt of 100. Both engines hold the same weights and run in
this one process, in turns, with fresh prompts each time; medians are printed.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import write_shape
from nanovllm import LLM, SamplingParams

OUTPUT_LEN = 48
WORKLOADS = {"8 ragged requests": [20, 46, 72, 97, 123, 149, 174, 200], "1 request": [100]}
Prompts = list[list[int]]


def transformers_generate(model: torch.nn.Module, prompts: Prompts) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generate(
        ids, attention_mask=mask, max_new_tokens=OUTPUT_LEN, min_new_tokens=OUTPUT_LEN,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def nanovllm_generate(llm: LLM, prompts: Prompts) -> None:
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        write_shape("qwen3-0.6b", directory)
        config = AutoConfig.from_pretrained(directory)
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).eval()
        model.save_pretrained(directory)
        (Path(directory) / "generation_config.json").unlink(missing_ok=True)
        llm = LLM(directory, device="cpu", max_model_len=4096)
    print(f"{args.threads} threads, torch {torch.__version__}, medians of {args.runs}")
    rng = random.Random(0)
    for name, lengths in WORKLOADS.items():
        seconds: dict[str, list[float]] = {"transformers": [], "nanovllm": []}
        for run in range(args.runs + 1):  # the first one warms up
            prompts = [[rng.randrange(1, 10000) for _ in range(n)] for n in lengths]
            theirs = timed(lambda: transformers_generate(model, prompts))  # noqa: B023
            ours = timed(lambda: nanovllm_generate(llm, prompts))  # noqa: B023
            if run:
                seconds["transformers"].append(theirs)
                seconds["nanovllm"].append(ours)
        rates = {
            engine: len(lengths) * OUTPUT_LEN / statistics.median(times)
            for engine, times in seconds.items()
        }
        ratio = statistics.median(
            t / n for t, n in zip(seconds["transformers"], seconds["nanovllm"])
        )
        print(
            f"{name}: transformers {rates['transformers']:.1f} tok/s, nanovllm "
            f"{rates['nanovllm']:.1f} tok/s, {ratio:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
