"""Tiny random checkpoints of several families, and what transformers generates with them."""

import json
import os
import random
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
VOCAB_SIZE = 128
INITIALIZER_RANGE = 0.15  # wide enough to keep logits apart
# Two tokens of a vocabulary whose logits are closer than this may swap places between two correct
# float32 implementations: seeds are chosen so that no reference comes near it.
SMALLEST_GAP = 1e-4
_OF_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight(|_scale_inv)")

SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "initializer_range": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
# By transformers' model_type, what a family has besides. Where the size of a head is not an option,
# or may be left out, it is the hidden size over the heads: 32 everywhere.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "qwen2": {"hidden_size": 128},
    "llama": {"hidden_size": 128},
    "mistral": {"hidden_size": 128, "sliding_window": None},
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen2_moe": {
        "hidden_size": 128,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
}
# What the first model would load otherwise, after conftest has frozen what there is: each closing
# of an engine would look through it for garbage.
for _family in FAMILIES:
    import_module(f"transformers.models.{_family}.modeling_{_family}")


def make_checkpoint(
    path: Path,
    *,
    family: str = "qwen3",
    seed: int = 0,
    max_shard_size: str = "1GB",
    rope: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Save a random float32 model under `path`: norms and biases too are random, so all matter.

    `rope` is a dict in the form of transformers 5 (`rope_parameters`); `options` are those of the
    family's config, and are in config.json as given.
    """
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    settings = SETTINGS | FAMILIES[family] | native_rope(rope) | options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).float()
    # Not transformers' own initialisation: its order is another in each version.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=INITIALIZER_RANGE, generator=generator)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    # transformers writes what it makes of the options: a head_dim that was left out, and no window
    # that is not used. Published checkpoints are not like that.
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    derived = {"head_dim"} & (content.keys() - settings.keys())
    changed = {name: value for name, value in options.items() if content.get(name) != value}
    if derived or changed:
        edit_json(path / "config.json", remove=tuple(derived), **changed)
    return path


def native_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` as the keys that the installed transformers itself writes into a config."""
    return {"rope_parameters": dict(rope)} if TRANSFORMERS_5 else old_rope(rope)


def old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` as the keys of transformers 4: theta at the top, the rest in `rope_scaling`."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theta = rope["rope_theta"]
    default = rope["rope_type"] == "default"
    return {"rope_theta": theta, "rope_scaling": None if default else scaling}


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change some keys of a JSON file, in place; it need not exist."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {key: value for key, value in content.items() if key not in remove} | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def link_checkpoint(source: Path, target: Path) -> Path:
    """A directory of its own that shares the weights: its JSON files can be edited."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_bytes(path.read_bytes())
        else:
            os.symlink(path.resolve(), target / path.name)
    return target


def rewritten(path: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint with other tensors."""
    copy = link_checkpoint(path, target)
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as transformers 5 holds them, all in two tensors; their scales of blocks in two."""
    stacks: dict[str, torch.Tensor] = {}
    parts: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _OF_EXPERT.fullmatch(name)) is None:
            stacks[name] = tensor
        else:
            parts.setdefault((match[1], match[3], match[4]), {})[int(match[2])] = tensor
    for (path, projection, kind), of_expert in parts.items():
        if projection == "up":
            continue
        rows = [of_expert[expert] for expert in range(len(of_expert))]
        if projection == "gate":
            ups = parts[path, "up", kind]
            rows = [torch.cat((gate, ups[expert])) for expert, gate in enumerate(rows)]
        name = "down_proj" if projection == "down" else "gate_up_proj"
        stacks[f"{path}.{name}{kind}"] = torch.stack(rows)
    return stacks


def add_tokenizer(path: Path, eos_token: str | None = None) -> Path:
    """Write a tokenizer of whole words, "t0 t1 t2 ...", each with the id of its number."""
    vocab = {f"t{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token).save_pretrained(path)
    return path


def random_tokens(length: int, seed: int = 0) -> list[int]:
    """A prompt; the shorter of two with one seed is a prefix of the longer."""
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


class Reference:
    """Greedy generation through transformers, one prompt at a time, each computed once."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        model = AutoModelForCausalLM.from_pretrained(
            path, torch_dtype=torch.float32, attn_implementation="eager"
        )
        self.model = model.to(device).eval()
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def tokens(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The `max_tokens` tokens that follow `prompt`; there is no end-of-sequence token."""
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            self._known[key] = self._generate(prompt, max_tokens)
        return self._known[key]

    @torch.inference_mode()
    def _generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        input_ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),  # without it, pad tokens are masked
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.cat(output.logits).topk(2).values
        gap = (best[:, 0] - best[:, 1]).min().item()
        assert gap > SMALLEST_GAP, f"two best logits {gap} apart: choose another seed"
        return output.sequences[0, len(prompt) :].tolist()
