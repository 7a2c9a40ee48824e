"""The files of a checkpoint: which are read, and what is said of those that cannot be."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import Reference, edit_json, make_checkpoint, random_tokens
from helpers.engines import GREEDY, build, greedy
from nanovllm.utils.checkpoint_files import (
    Headers,
    TensorHeader,
    check_num_layers,
    head_that_differs,
    read_headers,
    read_json_object,
    weight_files,
)

INDEX = "model.safetensors.index.json"


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_bytes(b"")
    return directory


def write_index(directory: Path, *names: str) -> None:
    weight_map = {f"tensor.{i}": name for i, name in enumerate(names)}
    edit_json(directory / INDEX, weight_map=weight_map)


def names_of(directory: Path) -> list[str]:
    return [path.name for path in weight_files(directory)]


# Which files

STRAY = ("adapter_model.safetensors", "consolidated.safetensors", "optimizer.safetensors")


def test_the_index_decides(tmp_path: Path):
    touch(tmp_path, "b.safetensors", "a.safetensors", "model.safetensors", *STRAY)
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    assert names_of(tmp_path) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"],) * 2,
        (["model.safetensors-00001-of-00001.safetensors"],) * 2,
        (["model.fp16.safetensors"],) * 2,
    ],
    ids=str,
)
def test_without_an_index_names_decide(tmp_path: Path, there: list[str], read: list[str]):
    touch(tmp_path, *there, *STRAY)
    assert names_of(tmp_path) == sorted(read)


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"], ids=["one file", "shards"])
def test_stray_files_do_not_stop_the_loading(tmp_path: Path, max_shard_size: str):
    path = make_checkpoint(tmp_path / "model", max_shard_size=max_shard_size)
    prompt = random_tokens(20, seed=1)
    expected = Reference(path).tokens(prompt, 12)
    for name in STRAY:
        save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, path / name)
    touch(path, "adapter_config.json", "optimizer.pt", "pytorch_model.bin")
    with build(path) as llm:
        assert greedy(llm, [prompt]) == [expected]


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/model.safetensors", "..", "", "model.bin"]
)
def test_an_index_that_points_elsewhere_is_refused_by_name(tmp_path: Path, name: str):
    touch(tmp_path, "model.safetensors", "model.bin")
    directory = tmp_path / "model"
    directory.mkdir()
    write_index(directory, name)
    with pytest.raises(ValueError, match=f"index.json names '{name}', which is no safetensors"):
        weight_files(directory)


def test_an_index_that_points_to_a_missing_file_is_refused_by_name(tmp_path: Path):
    touch(tmp_path, "model.safetensors")
    write_index(tmp_path, "model.safetensors", "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names 'gone\.safetensors', which is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", "[" * 10**5]
)
def test_an_index_of_no_use_is_refused_by_name(tmp_path: Path, content: str):
    touch(tmp_path, "model.safetensors")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


# What it is instead

FORMATS = [
    (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter.*merge"),
    (["model-Q4_K_M.gguf"], "GGUF.*checkpoint in safetensors"),
    (["pytorch_model.bin"], "pickled.*convert"), (["model.pt"], "pickled.*convert"),
    (["consolidated.00.pth"], "pickled.*convert"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "message"), FORMATS, ids=str)
@pytest.mark.parametrize("has_config", [False, True], ids=["alone", "with config.json"])
def test_another_format_is_named_with_what_to_do(
    tiny: Path, tmp_path: Path, has_config: bool, names: list[str], message: str
):
    touch(tmp_path, *names)
    if has_config:
        (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=message):
        build(tmp_path)


@pytest.mark.parametrize(("names", "message"), FORMATS[1:], ids=str)
def test_a_file_of_another_format_is_named_with_what_to_do(
    tmp_path: Path, names: list[str], message: str
):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=f"{names[0]}' is a file: .*{message}"):
        build(tmp_path / names[0])


def test_weights_by_another_name_are_named(tmp_path: Path):
    touch(tmp_path, "weights.safetensors", "consolidated.safetensors")
    message = r"but consolidated\.safetensors, weights\.safetensors: .*rename"
    with pytest.raises(FileNotFoundError, match=message):
        weight_files(tmp_path)


# What the files say


@pytest.mark.parametrize("num_bytes", [100, 10**9, 2**63], ids=["torn", "too long", "huge"])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, num_bytes: int):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", num_bytes) + b'{"a": ')
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        read_headers(tmp_path)


def test_json_that_is_nested_too_deeply_is_refused_by_name(tiny_copy: Path):
    for name in ("config.json", "generation_config.json"):
        (tiny_copy / name).write_text('{"a": ' + "[" * 10**5)
        with pytest.raises(ValueError, match=f"{name} is not a valid JSON object: .*too deeply"):
            read_json_object(tiny_copy / name)
    with pytest.raises(ValueError, match=r"config\.json is not a valid JSON object"):
        build(tiny_copy)


def headers_of_layers(*names: str) -> Headers:
    return {Path("dir/a"): {name: TensorHeader((2,), "F32") for name in names}}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_the_layers_in_the_files_are_counted(prefix: str):
    names = [f"{prefix}layers.{i}.{part}.weight" for i in (0, 1, 10) for part in ("up", "down")]
    headers = headers_of_layers(*names, "model.norm.weight", "layers.x.up", "other.layers.7.up")
    check_num_layers(headers, 3)
    with pytest.raises(ValueError, match=r"num_hidden_layers=4.* missing from the 1 .*there are 3"):
        check_num_layers(headers, 4)


# The output head


def head_files(path: Path, embedding: torch.Tensor, head: torch.Tensor) -> Path:
    save_file({"model.embed_tokens.weight": embedding}, path / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": head}, path / "model-00002-of-00002.safetensors")
    return path / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_is_compared_to_its_last_value(tmp_path: Path, dtype: torch.dtype):
    embedding = torch.randn(4096 + 5, 3).to(dtype)
    embedding[7, 1] = torch.nan
    head_files(tmp_path, embedding, embedding.clone())
    assert head_that_differs(read_headers(tmp_path)) is None
    for place in ((0, 0), (4095, 2), (4096, 0), (4100, 2)):
        head = embedding.clone()
        head[place] += 1
        file = head_files(tmp_path, embedding, head)
        assert head_that_differs(read_headers(tmp_path)) == file, place


@pytest.mark.parametrize("head", [torch.zeros(3, 4), torch.zeros(4, 3).bfloat16()], ids=str)
def test_a_head_of_another_shape_or_dtype_is_another(tmp_path: Path, head: torch.Tensor):
    file = head_files(tmp_path, torch.zeros(4, 3), head)
    assert head_that_differs(read_headers(tmp_path)) == file


def test_without_a_head_none_differs(tiny: Path, tmp_path: Path):
    tensors = load_file(tiny / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert head_that_differs(read_headers(tmp_path)) is None


def test_code_of_a_checkpoint_never_runs(tiny_copy: Path, tiny_reference: Reference):
    ran = tiny_copy / "ran"
    (tiny_copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nEvil = None\n")
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    edit_json(tiny_copy / "config.json", auto_map=auto_map)
    tokenizer_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit_json(tiny_copy / "tokenizer_config.json", auto_map=tokenizer_map)
    prompt = random_tokens(20, seed=1)
    with build(tiny_copy) as llm:
        assert greedy(llm, [prompt], GREEDY) == [tiny_reference.tokens(prompt, 12)]
    assert not ran.exists()
    assert json.loads((tiny_copy / "config.json").read_text())["auto_map"]
