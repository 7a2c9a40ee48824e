"""fp8 as it is defined, one row at a time, and transformers' models with it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import Reference, edit_json
from nanovllm import LLM, SamplingParams
from nanovllm.quantization.fp8 import Fp8Weight

FP8 = torch.float8_e4m3fn
GROUP = 128


def rounded(x: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """What remains of x [..., n] in e4m3, with a power of two in common to each row or group, in
    the dtype of x."""
    pieces = x.double().split(group or x.shape[-1], dim=-1)
    return torch.cat([_rounded(piece) for piece in pieces], dim=-1).to(x.dtype)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2((largest / 448).log2().ceil())
    return (x / scale).float().to(FP8).double() * scale


def quantized_reference(path: Path, group: int | None = None) -> Reference:
    """transformers' model of a checkpoint, whose layers' projections round what comes to fp8. What
    chooses among experts does not.

    Args:
        group: numbers that share a scale. Then the weights are in fp8 already; else they are
            rounded here.
    """
    reference = Reference(path)
    for name, module in reference.model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("gate"):
            if group is None:
                module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], group),))
        elif name.endswith("experts") and hasattr(module, "gate_up_proj"):  # transformers 5
            if group is None:
                for weight in module.parameters():
                    weight.data = rounded(weight.data)
            module.forward = partial(_rounded_experts, module, group)
        elif hasattr(module, "shared_expert_gate"):
            _move_gate(module.shared_expert, module.shared_expert_gate)
    return reference


def check_tokens(llm: LLM, reference: Reference, prompts: list[list[int]]) -> None:
    """Greedy tokens of an engine in float32, each held against what the reference says after the
    same tokens: first of each prompt alone, by other kernels, then of all at once.

    Two right engines need not agree in every token. Adding up in another order they differ by 10^-6
    at most. That may move a number which is near the border between two of e4m3 to the other one,
    by up to 1/8 of it, and all that follows by some percent. Where there was no such number yet,
    log probabilities agree to 10^-4. With random differences of 10^-6 before each rounding, they do
    so for 38% of the tokens or more, and the others are off by 0.34 at most; with differences of
    10^-4, and sums of 14 bits have larger ones, for 8% at most.
    """
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    for outputs in (alone, llm.generate(prompts, params, use_tqdm=False)):
        pairs = zip(prompts, outputs, strict=True)
        off = torch.cat([_deviations(reference, *pair) for pair in pairs])
        assert off.max() < 0.5
        assert (off < 1e-4).double().mean() > 0.25


@torch.inference_mode()
def _deviations(reference: Reference, prompt: list[int], output: Any) -> torch.Tensor:
    """By how much an engine's log probability of each token is another than the reference's, or the
    reference knows a likelier one."""
    tokens = output["token_ids"]
    logits = reference.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    of_tokens = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    own = [entry[token].logprob for entry, token in zip(output["logprobs"], tokens, strict=True)]
    return (torch.tensor(own) - of_tokens).abs().maximum(expected.amax(dim=-1) - of_tokens)


def _rounded_experts(
    experts: Any, group: int | None, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    x = rounded(x, group)[:, None, :, None]
    gate, up = (experts.gate_up_proj[chosen] @ x).chunk(2, dim=2)
    inner = rounded((experts.act_fn(gate) * up).squeeze(3), group)
    return (weights[:, :, None] * (experts.down_proj[chosen] @ inner[..., None]).squeeze(3)).sum(1)


def _move_gate(mlp: Any, gate: torch.nn.Linear) -> None:
    """Multiply by the gate before the last projection, which is where numbers are rounded."""
    weight = gate.weight

    def forward(x: torch.Tensor) -> torch.Tensor:
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(inner * (x @ weight.T).sigmoid())

    mlp.forward, gate.forward = forward, lambda x: torch.full_like(x[..., :1], 1e3)


def save_in_blocks(source: Path, target: Path, unconverted: tuple[str, ...] = ()) -> None:
    """A checkpoint in fp8, as Qwen publishes them, of one in float32; and its values once more in
    float32, in `target` / "widened"."""
    blocks, widened = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_converted = name.endswith("_proj.weight") and module not in unconverted
        blocks[name] = widened[name] = tensor
        if is_converted:
            values, scale = _in_blocks(tensor)
            blocks[name], blocks[f"{name}_scale_inv"] = values, scale
            out, k = tensor.shape
            repeated = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[:out, :k]
            widened[name] = values.float() * repeated
    config = {
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
            "modules_to_not_convert": ["lm_head", "mlp.gate", *unconverted],
        }
    }  # fmt: skip
    for directory, tensors, changes in (
        (target, blocks, config),
        (target / "widened", widened, {}),
    ):
        directory.mkdir(parents=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((source / "config.json").read_text(encoding="utf-8"))
        edit_json(directory / "config.json", **content, **changes)


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] e4m3 and [out / 128, in / 128], scales being no powers of two."""
    values = torch.empty(weight.shape, dtype=FP8)
    scale = torch.empty(-(-weight.shape[0] // GROUP), -(-weight.shape[1] // GROUP))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(i * GROUP, (i + 1) * GROUP), slice(j * GROUP, (j + 1) * GROUP))
            scale[i, j] = weight[place].abs().max() / 448
            values[place] = (weight[place] / scale[i, j]).to(FP8)
    return values, scale


def fp8_weight(
    out: int, k: int, group: int | None, device: str = "cpu", seed: int = 1
) -> tuple[Fp8Weight, torch.Tensor]:
    """A weight [out, k] whose scales are no powers of two, and its values in float64. A row of it
    is zero."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(out, k, generator=generator) * 100).clamp(-448, 448).to(FP8)
    groups = 1 if group is None else -(-k // group)
    scale = (torch.rand(groups, out, generator=generator) + 0.5) / (100 * k**0.5)
    scale[:, out // 2] = 0
    exact = values.double() * scale.t().double().repeat_interleave(group or k, dim=1)[:, :k]
    return Fp8Weight(values.to(device), scale.to(device).t()), exact.to(device)
