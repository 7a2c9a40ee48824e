"""The soak: many ragged requests through an engine short of memory, and what must hold all along.

    python -m benchmarks.soak                   # 20,000 requests
    python -m benchmarks.soak --requests 200    # on a CPU

A miniature of Qwen3 with random float32 weights, an end-of-sequence token that does occur, and a KV
cache so small that sequences are preempted all the time. Prompts of 1 to 200 tokens, some with a
prefix in common, outputs of up to 60, half greedy and half sampled with a seed; some requests are
aborted on the way. Checked, with exit status 1 if any fails:

- every request that was not aborted ends exactly once, and no aborted one does;
- blocks: the ref count is the number of tables that hold it, free ones are those with none; all are
  free in the end;
- memory of device and host is the same after all requests as after a quarter of them;
- a sample of the requests, each alone in a fresh engine, gives the very same tokens. (What a seed
  of this script runs is the same each time. Should two of a row's scores ever be so close that
  rounding decides, one request differs: another --seed tells that from a fault.)
"""

import argparse
import random
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch

from bench import MINIATURE, dummy_llm
from nanovllm import LLM, SamplingParams

SHAPE = MINIATURE | {"vocab_size": 64, "torch_dtype": "float32", "initializer_range": 0.15}
OPTIONS = {"max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 512}
NUM_BLOCKS, BLOCK_SIZE = 112, 16
MAX_PROMPT, MAX_OUTPUT, PREFIX = 200, 60, 96
WAVE = 96  # of 256 requests, so many in a row have short prompts and long outputs: all grow at once
CHECK_EVERY = 100  # steps


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams


def make_request(seed: int, index: int) -> Request:
    """Request `index` of the soak: the same each time."""
    rng, vocab = random.Random(f"{seed} {index}"), range(SHAPE["vocab_size"])
    if index % 256 < WAVE:
        prompt = rng.choices(vocab, k=rng.randint(1, 20))
        max_tokens = rng.randint(MAX_OUTPUT - 10, MAX_OUTPUT)
    else:
        prompt = rng.choices(vocab, k=rng.randint(1, MAX_PROMPT))
        if rng.random() < 0.3:
            prefix = random.Random(rng.randrange(4)).choices(vocab, k=PREFIX)
            prompt = (prefix + prompt)[:MAX_PROMPT]
        max_tokens = rng.randint(1, MAX_OUTPUT)
    temperature = 0 if rng.random() < 0.5 else rng.uniform(0.5, 2)
    return Request(
        prompt, SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=index)
    )


class Soak:
    """Drives the engine by hand, and notes what goes wrong in `failures`."""

    def __init__(self, llm: LLM, args: argparse.Namespace) -> None:
        self.llm, self.args = llm, args
        self.rng = random.Random(args.seed)
        self.sample = set(self.rng.sample(range(args.requests), min(args.sample, args.requests)))
        self.outstanding: dict[int, int] = {}  # request_id -> index
        self.tokens: dict[int, list[int]] = {}  # of the sample, by index
        self.reasons: Counter[str] = Counter()
        self.steps = 0
        self.failures: list[str] = []

    def run(self) -> None:
        added, early_memory = 0, None
        while added < self.args.requests or not self.llm.is_finished():
            while added < self.args.requests and len(self.outstanding) < self.args.outstanding:
                request = make_request(self.args.seed, added)
                self.outstanding[self.llm.add_request(request.prompt, request.params)] = added
                added += 1
            self.step()
            if early_memory is None and added >= self.args.requests // 4:
                early_memory = self.memory()
        if self.outstanding:
            self.failures.append(f"{len(self.outstanding)} requests never ended")
        self.check_blocks()
        if self.llm.scheduler.block_manager.num_free_blocks != NUM_BLOCKS:
            self.failures.append("blocks are not free although nothing runs")
        if not self.llm.scheduler.num_preemptions:
            self.failures.append("nothing was preempted: the soak tests too little")
        for name, now in self.memory().items():
            then, allowed = early_memory[name], self.args.allowed_growth * 2**20
            print(f"{name}: {then / 2**20:.1f} MiB after a quarter, {now / 2**20:.1f} in the end")
            if now - then > allowed:
                self.failures.append(f"{name} grew by {(now - then) / 2**20:.1f} MiB")

    def step(self) -> None:
        for output in self.llm.step():
            index = self.outstanding.pop(output["request_id"], None)
            if index is None:
                self.failures.append(f"request {output['request_id']} ended twice, or was aborted")
                continue
            self.reasons[output["finish_reason"]] += 1
            if index in self.sample:
                self.tokens[index] = output["token_ids"]
        self.steps += 1
        if self.outstanding and self.rng.random() < self.args.abort_rate:
            request_id = self.rng.choice(list(self.outstanding))
            self.llm.abort(request_id)
            del self.outstanding[request_id]
            self.reasons["abort"] += 1
        if self.steps % CHECK_EVERY == 0:
            self.check_blocks()

    def check_blocks(self) -> None:
        scheduler = self.llm.scheduler
        held = Counter(
            block_id
            for seq in (*scheduler.running, *scheduler.waiting)
            for block_id in seq.block_table
        )
        manager = scheduler.block_manager
        for block in manager.blocks:
            is_free = block.block_id in manager.free_blocks
            if block.ref_count != held[block.block_id] or is_free != (not block.ref_count):
                self.failures.append(
                    f"step {self.steps}: block {block.block_id}, {'' if is_free else 'not '}free, "
                    f"is in {held[block.block_id]} tables; ref count {block.ref_count}"
                )

    def memory(self) -> dict[str, int]:
        """Bytes in use: the host's peak (which a leak raises), and the device's."""
        unit = 1 if sys.platform == "darwin" else 1024
        used = {"host memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        if self.llm.config.torch_device.type == "cuda":
            used["allocated device memory"] = torch.cuda.memory_allocated()
            free, total = torch.cuda.mem_get_info()
            used["device memory"] = total - free
        return used

    def check_alone(self, llm: LLM) -> int:
        """Run what of the sample has ended once more, one by one; returns how many that is."""
        for index, tokens in self.tokens.items():
            request = make_request(self.args.seed, index)
            (alone,) = llm.generate(request.prompt, request.params, use_tqdm=False)
            if alone["token_ids"] != tokens:
                self.failures.append(f"request {index}: {tokens}, alone {alone['token_ids']}")
        return len(self.tokens)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--sample", type=int, default=200, help="requests to run again, alone")
    parser.add_argument("--outstanding", type=int, default=128, help="requests at a time")
    parser.add_argument("--abort-rate", type=float, default=0.03, help="chance of one in a step")
    parser.add_argument("--allowed-growth", type=float, default=64, help="of memory, in MiB")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.requests, args.outstanding) < 1:
        parser.error("--requests and --outstanding must be at least 1")
    options = OPTIONS | {
        "kvcache_block_size": BLOCK_SIZE, "attention_backend": args.attention_backend
    }  # fmt: skip
    start = time.perf_counter()
    with dummy_llm("qwen3-0.6b", SHAPE, num_kvcache_blocks=NUM_BLOCKS, **options) as llm:
        soak = Soak(llm, args)
        soak.run()
        print(
            f"{args.requests} requests in {soak.steps} steps and {time.perf_counter() - start:.1f} "
            f"s: {dict(soak.reasons)}, {llm.scheduler.num_preemptions} preemptions"
        )
    with dummy_llm("qwen3-0.6b", SHAPE, num_kvcache_blocks=NUM_BLOCKS, **options) as llm:
        print(f"{soak.check_alone(llm)} requests compared with a run alone")
    for failure in soak.failures[:20]:
        print(f"FAILED: {failure}")
    if soak.failures:
        sys.exit(f"{len(soak.failures)} failures")
    print(f"all held, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
