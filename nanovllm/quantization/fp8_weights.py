"""A model whose linear layers hold their weights in fp8, and how they get there.

Quantised are the projections of the decoder layers, those of experts too; embedding, output head
and norms stay as they are, and so do the routers of experts. A bf16 checkpoint is quantised tensor
by tensor as it is loaded, with a scale for each output: in bf16 its weights are never on the device
all at once. Of a checkpoint in fp8 the weights are copied as they are. The scale of a block is
stored once for each of the block's rows: projections are merged into one matrix, and GPUs have
parts of it, and neither need begin where a block does.
"""

from functools import partial

import torch
from torch import nn

from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.layers.moe import Experts, SparseMoE
from nanovllm.quantization.fp8 import GROUP, quantize
from nanovllm.quantization.fp8_checkpoints import Fp8Blocks
from nanovllm.utils.loader import Stack, View

_FIRST_WITH_FP8 = (8, 9)
_SCALE = ".weight_scale"
_PIECE = 2**24  # elements of a weight that are in float32 at once


def check_fp8_device(device: torch.device) -> None:
    """Raises:
    ValueError: for a GPU that cannot multiply in fp8.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_WITH_FP8:
        raise ValueError(
            "weights in fp8 need a GPU of compute capability 8.9 (Ada) or later, and "
            f"{str(device)!r} has {capability[0]}.{capability[1]}: give the bf16 checkpoint, "
            "without quantization"
        )


def use_fp8(layers: nn.Module, blocks: Fp8Blocks | None, path: str = "model.layers") -> None:
    """Let the projections in decoder layers, which have no memory yet, be in fp8.

    Args:
        blocks: the format of the checkpoint, if it is in fp8 already.
        path: of the layers, in the model.

    Raises:
        ValueError: for a layer that cannot be.
    """
    group = None if blocks is None else GROUP
    gates: list[Linear] = []
    for name, module in layers.named_modules(prefix=path):
        if isinstance(module, SparseMoE):
            gates += module.gates()
        if not isinstance(module, (Linear, Experts)) or module in gates:
            continue
        if blocks is not None and not _is_converted(name, module, blocks):
            continue
        module.store_in_fp8(group)


def fp8_views(views: dict[str, View], blocks: Fp8Blocks | None) -> dict[str, View]:
    """A model's `checkpoint_views`, in which scales are parameters, as its checkpoint has them.

    Args:
        blocks: the format of a checkpoint in fp8; None for one in bf16, which is quantised.
    """
    found = {name: view for name, view in views.items() if not name.endswith(_SCALE)}
    for name, scale in views.items():
        if name in found:
            continue
        weight_name = name.removesuffix("_scale")
        weight = found[weight_name]
        if blocks is None:
            store = partial(_quantize_into, weight.memory, scale.memory)
            found[weight_name] = weight._replace(store=store)
        else:
            found[weight_name] = weight._replace(in_fp8=True)
            found[f"{weight_name}_scale_inv"] = _view_of_blocks(scale)
    return found


def _is_converted(path: str, module: Linear | Experts, blocks: Fp8Blocks) -> bool:
    """Whether a projection is in fp8: all that are merged in one matrix, or in experts, or none."""
    names = [path]
    if isinstance(module, MergedLinear):
        names = [f"{path.rpartition('.')[0]}.{name}" for name in module.parts]
    elif isinstance(module, Experts):
        names = [f"{path}.{name}" for name in module.projections()]
    converted = {name: blocks.converts(name) for name in names}
    if len({*converted.values()}) > 1:
        raise ValueError(
            "config.json has modules_to_not_convert with some of projections that are computed as "
            f"one matrix, in fp8 or not: {_few(converted)}; give the bf16 checkpoint, with "
            "quantization='fp8' if it should be small"
        )
    return all(converted.values())


def _few(converted: dict[str, bool]) -> dict[str, bool]:
    """Some that are, and some that are not."""
    sorted_names = sorted(converted, key=lambda name: (converted[name], name))
    return {name: converted[name] for name in (*sorted_names[:2], *sorted_names[-2:])}


@torch.inference_mode()
def _quantize_into(memory: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> None:
    group = GROUP if scale.shape[1] > 1 else None
    step = max(1, _PIECE // weight.shape[1])
    pieces = zip(memory.split(step), scale.split(step), weight.split(step), strict=True)
    for own_memory, own_scale, rows in pieces:
        values, scales = quantize(rows.to(memory.device), group)
        own_memory.copy_(values)
        own_scale.copy_(scales)


def _view_of_blocks(scale: View) -> View:
    """The scales of a checkpoint, [out / 128, in / 128], that go to `scale`, [out, in / 128]."""
    out_features, groups = scale.shape
    first = scale.part[0].indices(out_features)[0]
    shape = (-(-out_features // GROUP), groups)
    store = partial(_repeat_into, scale.memory, first % GROUP)
    part = _in_blocks(scale.part[0], out_features), scale.part[1]
    return View(scale.memory, shape, part, _stack_of_blocks(scale.stack), store)


def _stack_of_blocks(stack: Stack | None) -> Stack | None:
    """The stack, [experts, out / 128, in / 128], in the place of one with scales for each output;
    None if gate and up, which are one below the other, have a block in common."""
    if stack is None:
        return None
    num_experts, out_features, groups = stack.shape
    shape = (num_experts, -(-out_features // GROUP), groups)
    expert, *rows = stack.place
    if not rows:
        return Stack(f"{stack.name}_inv", shape, (expert,))
    assert isinstance(rows[0], slice)
    if (rows[0].stop - rows[0].start) % GROUP:
        return None
    return Stack(f"{stack.name}_inv", shape, (expert, _in_blocks(rows[0], out_features)))


def _in_blocks(rows: slice, out_features: int) -> slice:
    first, end, _ = rows.indices(out_features)
    return slice(first // GROUP, -(-end // GROUP))


@torch.inference_mode()
def _repeat_into(memory: torch.Tensor, first: int, blocks: torch.Tensor) -> None:
    rows = blocks.to(memory.device, torch.float32).repeat_interleave(GROUP, dim=0)
    memory.copy_(rows[first : first + len(memory)])
