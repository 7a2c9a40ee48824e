"""How wrong narrower numbers are: logits and next tokens against float32, position by position.

    python -m benchmarks.errors                       # the demo model
    python -m benchmarks.errors --model path/to/checkpoint --tokens 10000

Each setting scores the same texts, which the float32 engine has sampled at temperature 1, by
`prompt_logprobs` over the whole vocabulary. Reported are the mean over positions of KL(float32 ||
setting), in nats, the greatest, the mean and greatest difference of a log probability among the 20
most likely tokens, and how often the most likely token is the same.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams

SETTINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32, keys and values in fp8": {"dtype": "float32", "kv_cache_dtype": "fp8"},
    "bfloat16, keys and values in fp8": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "float32, weights in fp8": {"dtype": "float32", "quantization": "fp8"},
    "bfloat16, weights in fp8": {"dtype": "bfloat16", "quantization": "fp8"},
    "bfloat16, both in fp8": {
        "dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8",
    },
}  # fmt: skip


def texts(model: str, tokens: int, length: int) -> list[list[int]]:
    """Token ids of samples of the model itself."""
    with LLM(model, dtype="float32", max_model_len=length + 1) as llm:
        number = -(-tokens // length)
        eos = sorted(llm.input_processor.eos_token_ids) or [0]
        params = SamplingParams(temperature=1.0, max_tokens=length - 1, ignore_eos=True)
        outputs = llm.generate([eos[:1]] * number, params, use_tqdm=False)
        return [eos[:1] + output["token_ids"] for output in outputs]


def logprobs(model: str, prompts: list[list[int]], options: dict[str, Any]) -> torch.Tensor:
    """[positions, vocab] float32, in token order."""
    rows = []
    with LLM(model, max_model_len=len(prompts[0]) + 2, **options) as llm:
        vocab = llm.config.model_config.vocab_size
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocab)
        for prompt in prompts:
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            for entries in output["prompt_logprobs"][1:]:
                row = torch.empty(vocab)
                row[list(entries)] = torch.tensor([entry["logprob"] for entry in entries.values()])
                rows.append(row)
    return torch.stack(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    demo = Path(__file__).parents[1] / "demo" / "tiny-qwen3"
    parser.add_argument("--model", default=str(demo))
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--length", type=int, default=200, help="of a text")
    args = parser.parse_args(argv)
    prompts = texts(args.model, args.tokens, args.length)
    exact = logprobs(args.model, prompts, {"dtype": "float32"})
    top = exact.topk(min(20, exact.shape[1]), dim=1).indices
    print(f"{len(exact):,} positions of {args.model}")
    print("| setting | mean KL | greatest KL | mean error | greatest error | same greedy token |")
    print("|---|---|---|---|---|---|")
    for name, options in SETTINGS.items():
        found = logprobs(args.model, prompts, options)
        kl = (exact.exp() * (exact - found)).sum(dim=1)
        errors = (found - exact).gather(1, top).abs()
        same = (found.argmax(dim=1) == exact.argmax(dim=1)).double().mean()
        print(
            f"| {name} | {kl.mean():.2e} | {kl.max():.2e} | {errors.mean():.2e} | "
            f"{errors.max():.2e} | {100 * same:.2f}% |"
        )


if __name__ == "__main__":
    main()
