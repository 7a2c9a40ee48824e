"""Tokens per second of nanovllm on one workload, and how close that is to the machine's limit.

    python bench.py                                  # random weights in the shape of Qwen3-0.6B
    python bench.py --model Qwen/Qwen3-0.6B          # real ones
    python bench.py --shape qwen3-8b --num-requests 64 --json result.json
    python bench.py --plot run.png                   # throughput, batch and KV cache over time

The floor is the time in which the workload could be done if nothing but the necessary happened:
bytes that must be read, over the read bandwidth measured here, plus the operations of prefill, over
the matrix-multiply rate measured here. Bytes: for each decode step the weights, once (the embedding
is not read whole, the head is), and for each generated token after a request's first the keys and
values of its context; those of a prefix that requests share are read once a step. Operations: two
per weight and prompt token, plus causal attention. Of a mixture of experts a step reads those that
its tokens hit, if they choose at random, and a token has the operations of those that it chooses.
Weights in fp8 have one byte and twice the rate. With --tensor-parallel-size each GPU has its share
of all that.
"""

import argparse
import importlib.util
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams, __version__
from nanovllm.config import Config
from nanovllm.models.config import ModelConfig
from nanovllm.models.sparse_config import SparseConfig

# hidden, intermediate, layers, heads, tied; heads are of 128, from Qwen's config.json
SHAPES = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, True),
    "qwen3-4b": (2560, 9728, 36, 32, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
    "qwen3-14b": (5120, 17408, 40, 40, False),
    "qwen3-32b": (5120, 25600, 64, 64, False),
    "qwen3-30b-a3b": (2048, 6144, 48, 32, False),
}
# What the mixtures of experts have besides.
MIXTURES = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip
H200_RATES = (4.2e12, 805e12)  # bytes per second read, bf16 operations per second, as measured
# What makes a miniature of any of them, to try a script or the engine out on a CPU.
MINIATURE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    "eos_token_id": 2, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@dataclass
class Workload:
    """Prompts of random token ids, and how many tokens each is to generate."""

    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def draw(
        cls,
        num_requests: int,
        input_len: tuple[int, int],
        output_len: tuple[int, int],
        vocab_size: int,
        seed: int,
        prefix_len: int = 0,
    ) -> "Workload":
        """The field's usual workload: lengths uniform in the given ranges, ids up to 10,000."""
        rng = random.Random(seed)
        top = min(10000, vocab_size - 1)
        prompts = [
            [rng.randint(0, top) for _ in range(rng.randint(*input_len))]
            for _ in range(num_requests)
        ]
        output_lens = [rng.randint(*output_len) for _ in range(num_requests)]
        prefix = [rng.randint(0, top) for _ in range(prefix_len)]
        return cls([prefix + prompt for prompt in prompts], output_lens)

    def renewed(self, run: int, vocab_size: int) -> "Workload":
        """The same lengths with other tokens, so that no run finds its prompts in the cache."""
        shifted = [[(t + 7919 * run) % vocab_size for t in prompt] for prompt in self.prompts]
        return Workload(shifted, self.output_lens)


def write_shape(shape: str, directory: str, changes: dict[str, Any] | None = None) -> None:
    """A config.json in the shape of a published Qwen3, with `changes` to its entries."""
    hidden, intermediate, layers, heads, tied = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
        "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "attention_bias": False, "initializer_range": 0.02, "eos_token_id": 151645,
    }  # fmt: skip
    config |= MIXTURES.get(shape, {}) | (changes or {})
    (Path(directory) / "config.json").write_text(json.dumps(config))


def dummy_llm(shape: str, changes: dict[str, Any] | None = None, **options: Any) -> LLM:
    """An engine with random weights in a shape, see `write_shape`; `options` are the engine's."""
    with tempfile.TemporaryDirectory() as directory:
        write_shape(shape, directory, changes)
        return LLM(directory, load_format="dummy", **options)


def measure_machine(device: torch.device) -> tuple[float, float]:
    """(bytes per second read, bf16 operations per second), each the best of several tries."""
    on_gpu = device.type == "cuda"
    data = torch.ones(2**30 if on_gpu else 2**27, dtype=torch.float32, device=device)
    read_rate = data.nbytes / _best_seconds(data.sum, device)
    n = 8192 if on_gpu else 1024
    rates = []
    # A CPU without bf16 instructions is faster in float32.
    for dtype in (torch.bfloat16,) if on_gpu else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / _best_seconds(partial(torch.matmul, a, b), device))
    return read_rate, max(rates)


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < 8 and sum(times) < 5:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def layer_weights(config: ModelConfig, tokens: float) -> float:
    """Elements of the layers' weights that a step of so many tokens needs, on average; with 1 those
    that each token is multiplied with."""
    hidden, num_layers, num_sparse = config.hidden_size, config.num_hidden_layers, 0
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    total = num_layers * hidden * 2 * (heads + kv_heads) * config.head_dim
    if isinstance(config, SparseConfig):
        num_sparse = sum(map(config.is_sparse, range(num_layers)))
        missed = (1 - config.num_experts_per_tok / config.num_experts) ** tokens
        hit = config.num_experts * (1 - missed)
        router = hidden * config.num_experts
        inner = hit * config.moe_intermediate_size
        inner += getattr(config, "shared_expert_intermediate_size", 0)
        total += num_sparse * (router + inner * 3 * hidden)
    return total + (num_layers - num_sparse) * 3 * hidden * config.intermediate_size


def floor_seconds(
    engine_config: Config,
    workload: Workload,
    read_rate: float,
    matmul_rate: float,
    prefix_len: int = 0,
    num_prefixes: int = 1,
) -> dict[str, float]:
    """Least seconds for decode (weights, keys and values) and prefill; see the top of the file.

    The rates are those of one GPU. The first `prefix_len` tokens of a prompt are one of
    `num_prefixes`: they are computed once, and read once in each step.
    """
    config, itemsize = engine_config.model_config, engine_config.torch_dtype.itemsize
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    kv_bytes = 2 * config.num_hidden_layers * kv_size * engine_config.kv_torch_dtype.itemsize

    most = engine_config.max_model_len
    lens = [(len(p), min(o, most - len(p))) for p, o in zip(workload.prompts, workload.output_lens)]
    generated = sum(o - 1 for _, o in lens)
    steps = max(max(o - 1 for _, o in lens), -(-generated // engine_config.max_num_seqs))
    if len(lens) <= engine_config.max_num_seqs:  # all begin at once
        rows = [sum(o - 1 > step for _, o in lens) for step in range(steps)]
        layers = sum(layer_weights(config, number) for number in rows)
    else:
        layers = steps * layer_weights(config, generated / max(steps, 1))
    # The token at position p attends to p + 1: sum over p from the prompt's end on.
    contexts = sum((o - 1) * (p + 1) + (o - 1) * (o - 2) // 2 for p, o in lens)
    contexts -= prefix_len * max(0, generated - steps * num_prefixes)
    again = len(lens) - num_prefixes  # prompts that find their prefix computed
    prompt_tokens = sum(p for p, _ in lens) - again * prefix_len
    pairs = sum(p * (p + 1) // 2 for p, _ in lens) - again * prefix_len * (prefix_len + 1) // 2
    active = layer_weights(config, 1)
    weight_bytes, speed = (1, 2) if engine_config.has_fp8_weights else (itemsize, 1)
    prefill_ops = 2 * active * prompt_tokens / speed + 4 * config.num_hidden_layers * q_size * pairs
    ranks = engine_config.tensor_parallel_size
    return {
        "weights": (layers * weight_bytes + steps * head * itemsize) / read_rate / ranks,
        # Past that number ranks have the same heads.
        "keys_and_values": contexts * kv_bytes / read_rate / min(ranks, config.num_key_value_heads),
        "prefill": prefill_ops / matmul_rate / ranks,
    }


def run(
    llm: LLM,
    workload: Workload,
    temperature: float,
    use_tqdm: bool,
    options: Sequence[dict[str, Any]] = (),
) -> dict[str, float]:
    """Generate once; seconds and tokens of it. `options` are of SamplingParams, for the first
    requests."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, **own)
        for n, own in zip_longest(workload.output_lens, options, fillvalue={})
    ]
    before = replace(llm.stats)
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=use_tqdm)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "prompt_tokens": sum(output["num_prompt_tokens"] for output in outputs),
        "cached_tokens": sum(output["num_cached_tokens"] for output in outputs),
        "output_tokens": sum(len(output["token_ids"]) for output in outputs),
        **asdict(llm.stats.since(before)),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint directory or hub id, in place of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="random weights")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--num-requests", type=int, help="default: 256 on a GPU, 8 on a CPU")
    parser.add_argument(
        "--input-len", type=int, nargs=2, metavar=("MIN", "MAX"), help="default: 100 1024 or 20 200"
    )
    parser.add_argument(
        "--output-len", type=int, nargs=2, metavar=("MIN", "MAX"), help="default: 100 1024 or 16 64"
    )
    parser.add_argument("--prefix-len", type=int, default=0, help="tokens that all prompts share")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=int, default=2, help="with other tokens each; the first one warms up"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw the last run over its time (needs matplotlib)"
    )
    parser.add_argument("--no-progress", action="store_true")
    engine = parser.add_argument_group("engine options")
    engine.add_argument("--device", default="auto")
    engine.add_argument("--dtype", default="auto")
    engine.add_argument("--attention-backend", default="auto")
    engine.add_argument("--enforce-eager", action="store_true")
    engine.add_argument("--kvcache-block-size", type=int, default=256)
    engine.add_argument("--num-kvcache-blocks", type=int)
    engine.add_argument("--max-model-len", type=int, default=4096)
    engine.add_argument("--max-num-seqs", type=int, default=512)
    engine.add_argument("--max-num-batched-tokens", type=int, default=16384)
    engine.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    engine.add_argument("--tensor-parallel-size", type=int, default=1)
    engine.add_argument("--kv-cache-dtype", default="auto")
    engine.add_argument("--quantization", choices=["fp8"], help="of the weights")
    args = parser.parse_args()
    for name in ("num_requests", "runs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("input_len", "output_len"):
        lens = getattr(args, name)
        if lens and not 1 <= lens[0] <= lens[1]:
            parser.error(f"--{name.replace('_', '-')} must be 1 <= MIN <= MAX, got {lens}")
    if args.prefix_len < 0:
        parser.error(f"--prefix-len must be at least 0, got {args.prefix_len}")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path and not Path(path).resolve().parent.is_dir():
            parser.error(f"--{name}: no directory for {path}")
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        parser.error(f"--plot writes a .png, got {args.plot}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install nanovllm[dev]")
    return args


def main() -> None:
    args = parse_args()
    if args.plot:  # nothing else needs matplotlib
        from benchmarks import timeline
    names = ("device", "dtype", "attention_backend", "enforce_eager", "kvcache_block_size")
    names += ("num_kvcache_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    names += ("gpu_memory_utilization", "tensor_parallel_size", "kv_cache_dtype")
    names += ("quantization",)
    options = {name: getattr(args, name) for name in names}
    start = time.perf_counter()
    if args.model is None:
        llm = dummy_llm(args.shape, seed=args.seed, **options)
    else:
        llm = LLM(args.model, load_format=args.load_format, seed=args.seed, **options)
    ready = time.perf_counter() - start
    backend = llm.model_runner.attention_backend
    device = llm.config.torch_device
    on_gpu = device.type == "cuda"
    vocab_size = llm.config.model_config.vocab_size
    workload = Workload.draw(
        args.num_requests or (256 if on_gpu else 8),
        tuple(args.input_len or ((100, 1024) if on_gpu else (20, 200))),
        tuple(args.output_len or ((100, 1024) if on_gpu else (16, 64))),
        vocab_size, args.seed, args.prefix_len,
    )  # fmt: skip

    name = f"{torch.get_num_threads()} CPU threads"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
    if args.tensor_parallel_size > 1:
        name = f"{args.tensor_parallel_size} x {name}"
    print(f"nanovllm {__version__}, {args.model or args.shape}, {name}, torch {torch.__version__}")
    dtype = str(llm.config.torch_dtype).removeprefix("torch.")
    num_blocks = llm.model_runner.num_kvcache_blocks
    print(
        f"{dtype}, attention: {backend}, KV cache: {num_blocks} "
        f"blocks of {llm.config.kvcache_block_size}, ready in {ready:.1f} s"
    )
    runs = []
    for index in range(args.runs):
        renewed = workload.renewed(index, vocab_size)
        is_drawn = args.plot and index == args.runs - 1
        with timeline.recorded(llm) if is_drawn else nullcontext() as moments:
            runs.append(run(llm, renewed, args.temperature, not args.no_progress))
        result = runs[-1]
        print(
            f"run {index + 1}: {result['prompt_tokens']} prompt tokens "
            f"({result['cached_tokens']} cached), {result['output_tokens']} generated in "
            f"{result['seconds']:.2f} s"
        )
    counted = runs[1:] or runs
    result = sorted(counted, key=lambda r: r["seconds"])[len(counted) // 2]
    seconds = statistics.median(r["seconds"] for r in counted)
    print(
        f"generated:  {result['output_tokens'] / seconds:10,.1f} tok/s over all\n"
        f"prefill:    {result['prefill_tokens'] / max(result['prefill_seconds'], 1e-9):10,.1f} "
        f"tok/s ({result['prefill_seconds']:.2f} s)\n"
        f"decode:     {result['decode_tokens'] / max(result['decode_seconds'], 1e-9):10,.1f} "
        f"tok/s ({result['decode_seconds']:.2f} s)"
    )
    llm.close()
    read_rate, matmul_rate = measure_machine(device)
    floor = floor_seconds(llm.config, workload, read_rate, matmul_rate, args.prefix_len)
    total = sum(floor.values())
    print(
        f"floor:      {total:10.2f} s: weights {floor['weights']:.2f}, keys and values "
        f"{floor['keys_and_values']:.2f}, prefill {floor['prefill']:.2f}\n"
        f"            (read {read_rate / 1e9:,.0f} GB/s and {matmul_rate / 1e12:,.2f} TFLOP/s "
        f"bf16, measured here)\n"
        f"reached:    {100 * total / seconds:9.0f}% of the floor's speed"
    )
    if args.json:
        report = {
            "version": __version__, "model": args.model or args.shape, "device": name,
            "machine": platform.machine(), "torch": torch.__version__, "ready_seconds": ready,
            "attention_backend": backend, "runs": runs,
            "tokens_per_second": result["output_tokens"] / seconds,
            "read_bytes_per_second": read_rate, "matmul_ops_per_second": matmul_rate,
            "floor_seconds": floor,
            "options": {k: v for k, v in vars(args).items() if k not in ("json", "plot")},
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        last, model = runs[-1], "/".join(Path(args.model or args.shape).parts[-2:])
        title = (
            f"{model} in {dtype} on {name}\n"
            f"{len(workload.prompts):,} requests, {last['prompt_tokens']:,} prompt and "
            f"{last['output_tokens']:,} generated tokens in {last['seconds']:.1f} s"
        )
        timeline.draw(moments, num_blocks, title, Path(args.plot))


if __name__ == "__main__":
    main()
