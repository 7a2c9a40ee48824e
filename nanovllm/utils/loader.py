"""Weights: safetensors files to parameters, or random ones in their place."""

import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from nanovllm.utils.checkpoint_files import Headers, describe, read_headers

_FLOATS = {  # safetensors' names of the dtypes that can be loaded
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_FP8 = {"F8_E4M3": torch.float8_e4m3fn}


class Stack(NamedTuple):
    """A tensor that a checkpoint may hold in place of several, all of them in one.

    Attributes:
        name, shape: of the stack.
        place: of one of the tensors in it, as an index.
    """

    name: str
    shape: tuple[int, ...]
    place: tuple[int | slice, ...]


class View(NamedTuple):
    """Where a tensor of the checkpoint goes, or the part of it that is wanted.

    Attributes:
        memory: of the part; on the "meta" device if the tensor is to be there, and is not used.
        shape: of the whole tensor.
        part: a slice of each dimension.
        stack: the tensor that may hold it among others, if there is such a form.
        store: takes the part where it is more than a copy to `memory`, such as a quantisation.
        in_fp8: the checkpoint has it in e4m3.
    """

    memory: torch.Tensor
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    stack: Stack | None = None
    store: Callable[[torch.Tensor], None] | None = None
    in_fp8: bool = False

    @classmethod
    def whole(cls, memory: torch.Tensor) -> "View":
        return cls(memory, tuple(memory.shape), (slice(None),) * memory.dim())

    @property
    def is_whole(self) -> bool:
        return tuple(self.memory.shape) == self.shape

    def fill(self, part: torch.Tensor) -> None:
        """Put the part there."""
        if self.store is None:
            self.memory.copy_(part)
        else:
            self.store(part)


def checkpoint_dtype(model_dir: Path) -> torch.dtype | None:
    """The dtype of the first floating-point weight of a checkpoint; None without one."""
    try:
        headers = read_headers(model_dir)
    except (FileNotFoundError, ValueError):
        return None  # `check_weights` says what is wrong
    for tensors in headers.values():
        for name, header in tensors.items():
            dtype = _FLOATS.get(header.dtype)
            if dtype is not None and not name.endswith(("scale", "scale_inv")):
                return torch.float32 if dtype == torch.float64 else dtype
    return None


def check_weights(
    headers: Headers, views: dict[str, View], ignored: frozenset[str] = frozenset()
) -> None:
    """Check all names, shapes and dtypes; the views may have no memory yet.

    Raises:
        ValueError: for a tensor that is missing, unexpected, given twice, or of the wrong shape;
            the message names the file and the tensor.
    """
    _plan(headers, views, ignored)


def load_weights(
    headers: Headers, views: dict[str, View], ignored: frozenset[str] = frozenset()
) -> None:
    """Fill `views`, by tensor name, from the files of a checkpoint.

    Files are mapped into memory and copied tensor by tensor, so the host never holds a second copy
    of the model; of a tensor that is wanted in part, only that part is read. Tensors named in
    `ignored` may be there or not, and are not read.

    Raises:
        ValueError: as `check_weights`, before the first tensor is copied.
    """
    plan = _plan(headers, views, ignored)
    for path, names in plan.items():
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, pieces in names.items():
                for key, index in pieces:
                    view = views[key]
                    if index:
                        found = file.get_slice(name)[index][view.part]
                    elif view.is_whole:
                        found = file.get_tensor(name)
                    else:
                        found = file.get_slice(name)[view.part]
                    view.fill(found)


def update_weights(
    weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    views: dict[str, View],
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Copy tensors to the `views` of their names, one by one as they come, from any device and in
    any floating-point dtype. Views that get none stay as they are; `ignored` as in `load_weights`.

    Raises:
        TypeError, ValueError: for a tensor that is unexpected, of the wrong shape or no floats.
            Those before it have been copied.
    """
    wanted = _wanted_tensors(views)
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name!r} must be a tensor, got {type(tensor).__name__}")
        if (full_name := _full_name(name, wanted, ignored)) is None:
            continue
        if full_name not in wanted:
            raise ValueError(f"unexpected tensor {name!r}: the model has none of that name")
        shape, pieces = wanted[full_name]
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"tensor {name!r} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}"
            )
        if tensor.dtype not in _FLOATS.values():
            raise ValueError(f"tensor {name!r} has {tensor.dtype}; supported are {[*_FLOATS]}")
        with torch.inference_mode():  # not around `weights`, which may be the caller's own code
            for key, index in pieces:
                views[key].fill(tensor[index][views[key].part])


# By the name of a view, the index of what it gets in a tensor of a file: () if that is all of it.
_Pieces = list[tuple[str, tuple[int | slice, ...]]]


def _wanted_tensors(views: dict[str, View]) -> dict[str, tuple[tuple[int, ...], _Pieces]]:
    """Of each tensor that a checkpoint may hold, the shape, and the views that it fills."""
    wanted: dict[str, tuple[tuple[int, ...], _Pieces]] = {}
    for key, view in views.items():
        wanted[key] = view.shape, [(key, ())]
        if view.stack is not None:
            _, pieces = wanted.setdefault(view.stack.name, (view.stack.shape, []))
            pieces.append((key, view.stack.place))
    return wanted


def _full_name(name: str, wanted: Container[str], ignored: frozenset[str]) -> str | None:
    """What the model calls a tensor; None for one that is not read. A network saved without its
    head, as embedding models are, has names without "model."."""
    if name in ignored or name.endswith("rotary_emb.inv_freq"):
        return None
    return name if name in wanted else f"model.{name}"


def _plan(
    headers: Headers, views: dict[str, View], ignored: frozenset[str]
) -> dict[Path, dict[str, _Pieces]]:
    """Which tensors to take from which file, and the views that each fills, everything checked."""
    wanted = _wanted_tensors(views)
    plan: dict[Path, dict[str, _Pieces]] = {}
    source: dict[str, Path] = {}
    for path, tensors in headers.items():
        plan[path] = {}
        for name, header in tensors.items():
            if (full_name := _full_name(name, wanted, ignored)) is None:
                continue
            if full_name not in wanted:
                raise ValueError(f"{path} holds an unexpected tensor {name!r}")
            shape, pieces = wanted[full_name]
            if (twice := next((key for key, _ in pieces if key in source), None)) is not None:
                again = "" if twice == full_name else f", as {twice!r},"
                raise ValueError(f"tensor {name!r} is both in {source[twice]}{again} and in {path}")
            if shape != header.shape:
                raise ValueError(
                    f"tensor {name!r} in {path} has shape {list(header.shape)}, config.json asks "
                    f"for {list(shape)}"
                )
            in_fp8 = views[pieces[0][0]].in_fp8
            dtypes = _FP8 if in_fp8 else _FLOATS
            if header.dtype not in dtypes:
                why = ", as config.json's quantization_config says of it" if in_fp8 else ""
                if header.dtype in _FP8:
                    why = ", as config.json has no quantization_config that says fp8 of it"
                raise ValueError(
                    f"tensor {name!r} in {path} has dtype {header.dtype}; supported are "
                    f"{[*dtypes]}{why}"
                )
            source |= {key: path for key, _ in pieces}
            plan[path][name] = pieces
    missing = [name for name in views if name not in source]
    if missing:
        raise ValueError(
            f"tensor {missing[0]!r} (and {len(missing) - 1} more) is missing from "
            f"{describe(headers)}"
        )
    return plan


def fill_with_noise(views: dict[str, View], std: float, seed: int) -> None:
    """Random weights, reproducible: normal with deviation `std`; norms get ones, biases zeros.

    A long pool of numbers is drawn once and copied round and round, which is as good for timing and
    far faster than drawing billions. A part of a tensor gets the numbers that it has in the whole.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 2**22 + 1  # odd: rows do not repeat
    pool = torch.randn(size, generator=generator, dtype=torch.float32).mul_(std)
    for name, view in views.items():
        memory, shape, part = view.memory, view.shape, view.part
        if len(shape) == 1:
            memory.fill_(1.0 if "norm" in name else 0.0)
            continue
        pool = pool.to(memory.device, memory.dtype if view.store is None else pool.dtype)
        is_in_place = view.is_whole and view.store is None
        whole = memory if is_in_place else torch.empty(shape, dtype=pool.dtype, device=pool.device)
        flat = whole.view(-1)
        start = -(zlib.crc32(name.encode()) % size)  # no two tensors begin alike
        while start < flat.numel():
            piece = flat[max(start, 0) : start + size]
            offset = max(-start, 0)
            piece.copy_(pool[offset : offset + piece.numel()])
            start += size
        if not is_in_place:
            view.fill(whole[part])
