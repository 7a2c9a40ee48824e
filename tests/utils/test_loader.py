"""A checkpoint's weights: converted where they can be, else refused by the name of the tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import Reference, link_checkpoint, make_checkpoint, random_tokens
from helpers.engines import PROMPTS, build
from nanovllm import SamplingParams
from nanovllm.utils.loader import View, checkpoint_dtype, fill_with_noise

GREEDY = SamplingParams(temperature=0, max_tokens=8)
GOOD = random_tokens(20, seed=1)
NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint directory, and the tensors of its only file, to be changed and saved again."""
    path = make_checkpoint(tmp_path / "model")
    return path, load_file(path / "model.safetensors")


def save(path: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, path / name, metadata={"format": "pt"})


def test_missing_weights_are_refused(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model")
    (path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no model\*\.safetensors file.*load_format='dummy'"
    ):
        build(path)


def test_missing_tensor_is_named(weights):
    path, tensors = weights
    del tensors[NAME]
    save(path, tensors)
    with pytest.raises(ValueError, match=rf"'{NAME}'.* is missing from"):
        build(path)


def test_unexpected_tensor_is_named(weights):
    path, tensors = weights
    save(path, tensors | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})
    message = r"model\.safetensors holds an unexpected tensor 'model\.layers\.9\.mlp\.up_proj"
    with pytest.raises(ValueError, match=message):
        build(path)


def test_misshaped_tensor_is_named_with_both_shapes(weights):
    path, tensors = weights
    tensors[NAME] = tensors[NAME].T.contiguous()[:, :32].contiguous()
    save(path, tensors)
    message = rf"'{NAME}' in .*model\.safetensors has shape \[64, 32\].*\[64, 64\]"
    with pytest.raises(ValueError, match=message):
        build(path)


def test_tensor_in_two_files_is_named_with_both_files(weights):
    path, tensors = weights
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    save(path, {NAME: tensors[NAME]}, "model-2.safetensors")
    message = rf"'{NAME}' is both in .*model-1\.safetensors and in .*model-2\.safetensors"
    with pytest.raises(ValueError, match=message):
        build(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_file_is_named(weights, share: float):
    path, _ = weights
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        build(path)


@pytest.mark.parametrize("has_index", [True, False])
def test_second_shard_missing_is_noticed(tmp_path: Path, has_index: bool):
    path = make_checkpoint(tmp_path / "model", max_shard_size="100KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    if not has_index:
        (path / "model.safetensors.index.json").unlink()
    message = f"'{shards[-1].name}', which is missing" if has_index else "is missing from"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(path)


def test_tied_head_may_be_stored_too(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    expected = Reference(path).tokens(GOOD, 8)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save(path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    with build(path) as llm:
        assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0]["token_ids"] == expected


def test_weights_of_another_dtype_are_converted(weights):
    path, tensors = weights
    save(path, {name: tensor.to(torch.bfloat16).double() for name, tensor in tensors.items()})
    expected = Reference(path).tokens(GOOD, 8)
    with build(path, dtype="float32") as llm:
        assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0]["token_ids"] == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_plain_floats_are_refused_by_name(weights, dtype: torch.dtype):
    path, tensors = weights
    save(path, tensors | {NAME: torch.zeros_like(tensors[NAME]).to(dtype)})
    with pytest.raises(ValueError, match=NAME):
        build(path)


def test_failed_construction_leaves_room_for_another(tiny: Path, weights, tiny_reference):
    path, tensors = weights
    del tensors[NAME]
    save(path, tensors)
    with pytest.raises(ValueError):
        build(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == "qwen3"
    with build(tiny) as llm:
        output = llm.generate(GOOD, GREEDY, use_tqdm=False)[0]
        assert output["token_ids"] == tiny_reference.tokens(GOOD, 8)


# Dummy weights, and the dtype of real ones


def test_dummy_weights_need_no_files_and_repeat(tiny: Path, tmp_path: Path):
    path = link_checkpoint(tiny, tmp_path / "model")
    (path / "model.safetensors").unlink()
    found = []
    for seed in (0, 0, 1):
        with build(path, load_format="dummy", seed=seed) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            found.append([output["token_ids"] for output in outputs])
    assert found[0] == found[1] != found[2]


def test_noise_has_the_deviation_asked_for_and_norms_are_ones():
    memory = {"norm.weight": torch.empty(50), "up.bias": torch.empty(200)}
    memory |= {"up.weight": torch.empty(200, 300), "gate.weight": torch.empty(200, 300)}
    views = {name: View.whole(tensor) for name, tensor in memory.items()}
    fill_with_noise(views, std=0.3, seed=5)
    assert torch.equal(memory["norm.weight"], torch.ones(50))
    assert torch.equal(memory["up.bias"], torch.zeros(200))
    weight = memory["up.weight"].clone()
    assert weight.std().item() == pytest.approx(0.3, rel=0.02) and abs(weight.mean()) < 0.01
    assert not torch.isclose(memory["gate.weight"], weight).all(dim=1).any()
    fill_with_noise(views, std=0.3, seed=5)
    assert torch.equal(memory["up.weight"], weight)
    fill_with_noise(views, std=0.3, seed=6)
    assert not torch.isclose(memory["up.weight"], weight).all(dim=1).any()


def test_a_part_of_a_tensor_has_the_noise_of_its_place_in_the_whole():
    shape, part = (3000, 2000), (slice(1000, 2000), slice(500, 700))  # longer than the pool
    whole, piece = torch.empty(shape), torch.empty(1000, 200)
    fill_with_noise({"up.weight": View.whole(whole)}, std=0.3, seed=5)
    fill_with_noise({"up.weight": View(piece, shape, part)}, std=0.3, seed=5)
    assert torch.equal(piece, whole[part])
    assert whole.std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": torch.float16}, torch.float16), ({"a": torch.float64}, torch.float32),
        ({"a": torch.int64, "b": torch.bfloat16}, torch.bfloat16), ({"a": torch.int8}, None),
        ({"a.k_scale": torch.float32, "b": torch.bfloat16}, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoints_dtype_is_that_of_its_first_floats(
    tmp_path: Path, tensors: dict[str, torch.dtype], expected: torch.dtype | None
):
    assert checkpoint_dtype(tmp_path) is None, "without a file"
    save(tmp_path, {name: torch.zeros(2, dtype=dtype) for name, dtype in tensors.items()})
    assert checkpoint_dtype(tmp_path) == expected


def test_a_checkpoint_that_cannot_be_read_has_no_dtype(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    assert checkpoint_dtype(tmp_path) is None
