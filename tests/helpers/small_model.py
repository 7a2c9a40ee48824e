"""A model with a small vocabulary, and an account of its own of what sampling options do."""

import math
import random
from pathlib import Path
from typing import Any

import torch

from helpers.checkpoints import Reference, edit_json, make_checkpoint
from nanovllm import LLM, SamplingParams

VOCAB = 48
EOS = 14  # the likeliest token after PROMPT
PROMPT = [1, 2, 3]
Options = dict[str, Any]  # of a SamplingParams


class Model:
    """A checkpoint with a small vocabulary and an end-of-sequence token, and its logits."""

    def __init__(self, path: Path) -> None:
        self.path = make_checkpoint(path, vocab_size=VOCAB)
        edit_json(path / "generation_config.json", eos_token_id=EOS)
        self.network = Reference(path).model

    @torch.inference_mode()
    def logits(self, sequences: list[list[int]]) -> torch.Tensor:
        """[sequences, tokens, VOCAB] float64, by transformers; all of one length."""
        return self.network(torch.tensor(sequences)).logits.double()


def build(model: Model, **options) -> LLM:
    settings = {"kvcache_block_size": 16, "num_kvcache_blocks": 200, "device": "cpu"}
    return LLM(model.path, **settings | options)


def words(length: int, seed: int) -> list[int]:
    """A prompt; the shorter of two with one seed is a prefix of the longer."""
    source = random.Random(seed)
    return [source.randrange(VOCAB) for _ in range(length)]


def sample(llm: LLM, *many: Options, prompt: list[int] = PROMPT) -> list[dict]:
    params = [SamplingParams(**{"max_tokens": 12} | options) for options in many]
    return llm.generate([prompt] * len(many), params, use_tqdm=False)


def tokens_of(outputs: list[dict]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


# What the options mean, in float64 and one token at a time


def stop_tokens(options: Options) -> set[int]:
    return {*options.get("stop_token_ids", ())} | (set() if options.get("ignore_eos") else {EOS})


def edited_logits(
    logits: torch.Tensor, options: Options, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """[VOCAB] float64: logits after all that comes before the temperature."""
    x = logits.tolist()
    if "allowed_token_ids" in options:
        allowed = options["allowed_token_ids"]
        x = [value if token in allowed else -math.inf for token, value in enumerate(x)]
    if len(generated) < options.get("min_tokens", 0):
        for token in {EOS, *options.get("stop_token_ids", ())}:
            x[token] = -math.inf
    for token, bias in options.get("logit_bias", {}).items():
        x[token] += min(max(bias, -100), 100)
    repetition = options.get("repetition_penalty", 1)
    for token in {*prompt, *generated}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(generated):
        x[token] -= options.get("presence_penalty", 0)
    for token in generated:
        x[token] -= options.get("frequency_penalty", 0)
    return torch.tensor(x, dtype=torch.float64)


def truncated(p: torch.Tensor, options: Options) -> torch.Tensor:
    """[VOCAB] float64 probabilities after min_p, top_k and top_p, in this order."""
    p = p.where(p >= options.get("min_p", 0) * p.max(), 0)
    if options.get("top_k", 0) > 0:
        best = sorted(range(VOCAB), key=lambda token: -p[token])
        p[best[options["top_k"] :]] = 0
    p /= p.sum()
    top_p, kept = options.get("top_p", 1), 0.0
    if top_p < 1:
        for token in sorted(range(VOCAB), key=lambda token: -p[token]):
            assert abs(kept - top_p) > 1e-5, "too close to call: choose another top_p"
            p[token], kept = p[token] if kept < top_p else 0, kept + p[token].item()
    return p / p.sum()


def probabilities(
    logits: torch.Tensor, options: Options, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """[VOCAB] float64: those of the next token."""
    x = edited_logits(logits, options, prompt, generated)
    temperature = options.get("temperature", 1)
    if temperature < 1e-5:
        best = torch.zeros_like(x)
        best[x.argmax()] = 1
        return best
    return truncated((x / temperature).softmax(0), options)


def outcomes(model: Model, prompt: list[int], options: Options) -> dict[tuple[int, ...], float]:
    """All that a request may give, and how likely each is."""
    ended: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(options["max_tokens"]):
        logits, grown = model.logits([prompt + list(path) for path in live])[:, -1], {}
        for (path, so_far), row in zip(live.items(), logits, strict=True):
            p = probabilities(row, options, prompt, list(path))
            for token in p.nonzero().flatten().tolist():
                paths = ended if token in stop_tokens(options) else grown
                paths[(*path, token)] = so_far * p[token].item()
        live = grown
    return ended | live


def chi_squared(found: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How likely it is that `found`, drawn from `expected`, is no closer to it than it is."""
    counts: dict[tuple[int, ...], int] = {}
    for path in found:
        assert path in expected, f"{path} cannot be"
        counts[path] = counts.get(path, 0) + 1
    bins, rare = [], [0.0, 0]
    for path, probability in expected.items():
        if probability * len(found) >= 5:
            bins.append([probability * len(found), counts.get(path, 0)])
        else:
            rare = [rare[0] + probability * len(found), rare[1] + counts.get(path, 0)]
    if rare[0] >= 5 or not bins:
        bins.append(rare)
    else:
        bins[-1] = [bins[-1][0] + rare[0], bins[-1][1] + rare[1]]
    assert math.isclose(sum(e for e, _ in bins), len(found), rel_tol=1e-9)
    statistic = sum((count - e) ** 2 / e for e, count in bins)
    half_freedom, half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, half).item() if len(bins) > 1 else 1.0


def summary(output: dict) -> list[tuple]:
    return [(c["token_ids"], c["finish_reason"], c["stop_reason"]) for c in output["outputs"]]
