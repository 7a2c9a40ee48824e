"""The files of a checkpoint: which of them have the weights, and what their headers say."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
# Files that lie beside the weights of some checkpoints on the hub, and are not read.
OTHER_WEIGHTS = ["adapter_model*.safetensors", "consolidated*.safetensors"]
_LAYER = re.compile(r"(?:model\.)?layers\.([0-9]+)\.")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PIECE_ROWS = 4096
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor; `dtype` is safetensors' name, such as "BF16"."""

    shape: tuple[int, ...]
    dtype: str


# Of each file, in order, its tensors by name.
Headers = dict[Path, dict[str, TensorHeader]]


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ValueError: if it is anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except RecursionError:
        raise ValueError(f"{path} is not a valid JSON object: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a valid JSON object: {error}") from error
    return content


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that have the weights, sorted.

    They are those that `model.safetensors.index.json` names. Without one it is `model.safetensors`,
    or else every `model*.safetensors`; other safetensors files are adapters, states of optimizers,
    or the same weights under other names.

    Raises:
        FileNotFoundError: if there is none, or one that the index names is missing.
        ValueError: if the index has no such names.
    """
    if (model_dir / INDEX).is_file():
        return _indexed_files(model_dir)
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    paths = sorted(model_dir.glob("model*.safetensors"))
    if not paths:
        raise _no_weights(model_dir)
    return paths


def read_headers(model_dir: Path) -> Headers:
    """The headers of the files with the weights.

    Raises:
        FileNotFoundError, ValueError: as `weight_files`, and for a file that cannot be read; the
            message names it.
    """
    headers: Headers = {}
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                headers[path] = {
                    name: TensorHeader(tuple(piece.get_shape()), piece.get_dtype())
                    for name, piece in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return headers


def check_num_layers(headers: Headers, num_layers: int) -> None:
    """Raises:
    ValueError: if the files have fewer layers than config.json asks for.
    """
    found = [_LAYER.match(name) for tensors in headers.values() for name in tensors]
    stored = len({match[1] for match in found if match})
    if stored < num_layers:
        raise ValueError(
            f"config.json has num_hidden_layers={num_layers}, and a layer is missing from "
            f"{describe(headers)}: there are {stored}"
        )


def head_that_differs(headers: Headers) -> Path | None:
    """The file of an output head that is not the embedding's matrix; None if there is no such head.

    Both are read, a piece at a time.
    """
    sources = {name: path for path, tensors in headers.items() for name in tensors}
    if not {_HEAD, _EMBEDDING} <= sources.keys():
        return None
    head_path, embedding_path = sources[_HEAD], sources[_EMBEDDING]
    header = headers[head_path][_HEAD]
    if header != headers[embedding_path][_EMBEDDING]:
        return head_path
    with (
        safe_open(head_path, framework="pt", device="cpu") as head_file,
        safe_open(embedding_path, framework="pt", device="cpu") as embedding_file,
    ):
        head, embedding = head_file.get_slice(_HEAD), embedding_file.get_slice(_EMBEDDING)
        for start in range(0, header.shape[0] if header.shape else 0, _PIECE_ROWS):
            ours, theirs = (
                matrix[start : start + _PIECE_ROWS].view(torch.uint8)  # a NaN is equal to itself
                for matrix in (head, embedding)
            )
            if not torch.equal(ours, theirs):
                return head_path
    return None


def describe(headers: Headers) -> str:
    """The files, in words."""
    directory = next(iter(headers)).parent
    return f"the {len(headers)} safetensors file{'s' * (len(headers) > 1)} in {directory}"


def other_format(path: Path) -> str | None:
    """What a file or a directory is that has no weights to load, and what to do; None if it is no
    format that is known."""
    names = [path] if path.is_file() else sorted(path.iterdir())
    if any(name.suffix == ".gguf" for name in names):
        return (
            "it is a model in the GGUF format, which nanovllm does not read: give the checkpoint "
            "in safetensors that it was made from"
        )
    if any(name.name == "adapter_config.json" for name in names):
        return (
            "it is a LoRA adapter, not a whole model: merge it into its base model first (peft: "
            "`model.merge_and_unload().save_pretrained(directory)`)"
        )
    if any(name.match(pattern) for name in names for pattern in _PICKLES):
        return (
            "its weights are pickled (.bin, .pt or .pth), which can run code when they are read: "
            "convert them to safetensors (transformers: `AutoModelForCausalLM.from_pretrained("
            "source).save_pretrained(target)`, if you trust the source)"
        )
    return None


def _indexed_files(model_dir: Path) -> list[Path]:
    index = model_dir / INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: remove it, or write it again")
    paths = []
    for name in sorted(set(map(str, weight_map.values()))):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file beside it")
        if not (model_dir / name).is_file():
            raise FileNotFoundError(
                f"{index} names {name!r}, which is missing: fetch it, or remove the index if the "
                "weights are in other files"
            )
        paths.append(model_dir / name)
    return paths


def _no_weights(model_dir: Path) -> FileNotFoundError:
    found = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if (known := other_format(model_dir)) is not None:
        return FileNotFoundError(f"{model_dir} has no model*.safetensors file: {known}")
    if found:
        return FileNotFoundError(
            f"{model_dir} has no model*.safetensors file, but {', '.join(found)}: if one of them "
            "has the weights, by the names of transformers, rename it to model.safetensors"
        )
    return FileNotFoundError(
        f"{model_dir} has no model*.safetensors file; convert the checkpoint to safetensors, or "
        "use load_format='dummy' for random weights"
    )
