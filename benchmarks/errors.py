"""How wrong narrower numbers are: logits and next tokens against float32, position by position.

    python -m benchmarks.errors                       # the demo model
    python -m benchmarks.errors --model path/to/checkpoint --tokens 10000

Two engines are in memory at a time, that in float32 and another.

Each setting scores the same texts, which the float32 engine has sampled at temperature 1, over the
whole vocabulary. Reported are the mean over positions of KL(float32 ||
setting), in nats, the greatest, the mean and greatest difference of a log probability among the 20
most likely tokens, and how often the most likely token is the same.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.layers.logprobs import Logprobs

_TOP = 20  # likely tokens whose log probabilities are compared
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


@dataclass
class Errors:
    """Sums and maxima over positions."""

    positions: int = 0
    kl: float = 0.0
    greatest_kl: float = 0.0
    error: float = 0.0
    greatest_error: float = 0.0
    same: int = 0

    def add(self, exact: torch.Tensor, found: torch.Tensor) -> None:
        """Log probabilities of some positions, [positions, vocab] float32."""
        top = exact.topk(min(_TOP, exact.shape[1]), dim=1).indices
        kl = (exact.exp() * (exact - found)).sum(dim=1)
        errors = (found - exact).gather(1, top).abs()
        self.positions += len(exact)
        self.kl += kl.sum().item()
        self.greatest_kl = max(self.greatest_kl, kl.max().item())
        self.error += errors.mean(dim=1).sum().item()
        self.greatest_error = max(self.greatest_error, errors.max().item())
        self.same += int((found.argmax(dim=1) == exact.argmax(dim=1)).sum())

    def cells(self) -> list[str]:
        kl, error = self.kl / self.positions, self.error / self.positions
        numbers = [f"{x:.2e}" for x in (kl, self.greatest_kl, error, self.greatest_error)]
        return [*numbers, f"{100 * self.same / self.positions:.2f}%"]


def logprobs(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """[positions, vocab] float32, of the prompt's tokens but the first.

    They are taken where the sampler gets the logits: as an output's `prompt_logprobs` each would be
    an object.
    """
    sampler, pieces = llm.model_runner.sampler, []
    of_some = sampler.logprobs_of

    def keep(logits: torch.Tensor, *args: Any) -> Logprobs:
        pieces.append(logits.float().log_softmax(dim=1))
        return of_some(logits, *args)

    sampler.logprobs_of = keep  # type: ignore[method-assign]
    try:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        llm.generate([prompt], params, use_tqdm=False)
    finally:
        sampler.logprobs_of = of_some  # type: ignore[method-assign]
    return torch.cat(pieces)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    demo = Path(__file__).parents[1] / "demo" / "tiny-qwen3"
    parser.add_argument("--model", default=str(demo))
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--length", type=int, default=200, help="of a text")
    args = parser.parse_args(argv)
    prompts = texts(args.model, args.tokens, args.length)
    options: dict[str, Any] = {"max_model_len": args.length + 2, "gpu_memory_utilization": 0.45}
    print("| setting | mean KL | greatest KL | mean error | greatest error | same greedy token |")
    print("|---|---|---|---|---|---|")
    with LLM(args.model, dtype="float32", **options) as exact:
        for name, setting in SETTINGS.items():
            errors = Errors()
            with LLM(args.model, **options, **setting) as llm:
                for prompt in prompts:
                    errors.add(logprobs(exact, prompt), logprobs(llm, prompt))
            print(f"| {name} | " + " | ".join(errors.cells()) + " |", flush=True)
    print(f"{errors.positions:,} positions of {args.model}")


if __name__ == "__main__":
    main()
