"""What a kernel's Python wrapper launches, compiled for a card that need not be there.

    launches(rms_norm_triton, torch.empty(8, 1024, dtype=BF16), weight, 1e-6, card=H100)

calls the wrapper with stand-ins for tensors on a GPU: they have a type, a shape and strides, but no
memory. Each launch is handed to Triton as it is, which derives from the arguments what it always
does (types, constants, which integers are 1 or multiples of 16, which addresses are aligned) and
compiles, but launches nothing. So no constant of a kernel is repeated in a test, and no kernel is
known here by name. What the interpreter lets pass the compiler may not, and only the compiler tells
registers and shared memory.

It takes a process without TRITON_INTERPRET (see `run_compiler`), and no GPU: ptxas and cuobjdump
come with Triton.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Card:
    """A GPU, as far as wrappers ask. Shared memory is in bytes."""

    name: str
    capability: tuple[int, int]
    shared_per_program: int
    shared_per_multiprocessor: int
    multiprocessors: int

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    @property
    def device(self) -> torch.device:
        """Its index is the architecture's number. What a wrapper remembers of a device by its index
        is then no other card's, nor that of a GPU which is really there."""
        return torch.device("cuda", self.arch)

    def properties(self) -> SimpleNamespace:
        """What torch.cuda.get_device_properties returns, in part."""
        return SimpleNamespace(
            name=self.name, major=self.capability[0], minor=self.capability[1], warp_size=32,
            shared_memory_per_block_optin=self.shared_per_program,
            shared_memory_per_multiprocessor=self.shared_per_multiprocessor,
            multi_processor_count=self.multiprocessors,
        )  # fmt: skip


KIB = 1024
A100 = Card("A100", (8, 0), 163 * KIB, 164 * KIB, 108)
RTX_3090 = Card("RTX 3090", (8, 6), 99 * KIB, 100 * KIB, 82)
RTX_4090 = Card("RTX 4090", (8, 9), 99 * KIB, 100 * KIB, 128)
H100 = Card("H100", (9, 0), 227 * KIB, 228 * KIB, 132)
B200 = Card("B200", (10, 0), 227 * KIB, 228 * KIB, 148)
RTX_5090 = Card("RTX 5090", (12, 0), 99 * KIB, 100 * KIB, 170)
CARDS = (A100, RTX_3090, RTX_4090, H100, B200, RTX_5090)


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch of a kernel: `compiled` is Triton's, with the code of every stage in its `asm`."""

    name: str
    grid: tuple[int, ...]
    card: Card
    compiled: Any

    @property
    def num_warps(self) -> int:
        return self.compiled.metadata.num_warps

    @property
    def num_stages(self) -> int:
        return self.compiled.metadata.num_stages

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program takes."""
        return self.compiled.metadata.shared

    @property
    def fits(self) -> bool:
        """Whether the card has the shared memory; a launch that does not fit raises an error."""
        return self.shared <= self.card.shared_per_program

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._resources["REG"]

    @property
    def spills(self) -> int:
        """Bytes of a thread's stack, which holds the registers that there was no room for."""
        return self._resources["STACK"]

    @cached_property
    def sass(self) -> list[str]:
        """The machine's instructions, without the padding at the end. Slow for a large kernel."""
        code = self._cuobjdump("-sass")
        instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", code, re.MULTILINE)
        return [instruction for instruction in instructions if instruction != "NOP"]

    @cached_property
    def _resources(self) -> dict[str, int]:
        usage = self._cuobjdump("-res-usage")
        return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}

    def _cuobjdump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class StandIn(torch.Tensor):
    """A tensor without memory that passes for one on the card which is being simulated. Its storage
    begins at an aligned address."""

    card: Card
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # _Operations has it all

    @property
    def device(self) -> torch.device:
        return self.card.device

    def get_device(self) -> int:
        return self.card.arch

    def data_ptr(self) -> int:
        return 2**32 + self.storage_offset() * self.element_size()


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in of the same type, shape, strides, and place in its storage."""
    if isinstance(tensor, StandIn):
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = torch.empty(size, dtype=tensor.dtype, device="meta")
    place = tensor.size(), tensor.stride(), tensor.storage_offset()
    return _as_stand_in(storage.as_strided(*place))


class _Operations(TorchFunctionMode):
    """Operations on stand-ins give stand-ins, and so does what makes a tensor on a GPU.

    Torch itself sees tensors on "meta", which have shapes and no values.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, kwargs = (args, kwargs or {}), dict(kwargs or {})
        device = kwargs.get("device")
        on_card = device is not None and torch.device(device).type == "cuda"
        if on_card:
            kwargs["device"] = "meta"
        elif not any(isinstance(value, StandIn) for value in tree_leaves(given)):
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(StandIn, _plain, (args, kwargs))
        return tree_map_only(torch.Tensor, _as_stand_in, function(*args, **kwargs))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def _as_stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.Tensor.as_subclass(tensor, StandIn)


@contextmanager
def simulated(card: Card) -> Iterator[list[CompiledLaunch]]:
    """Where every launch is compiled for a card, and appended to the list.

    There torch tells of that card, and makes stand-ins for tensors on "cuda": a whole model can be
    built and run.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("with TRITON_INTERPRET set, there is nothing to compile")
    launched: list[CompiledLaunch] = []
    jit_run = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args)) | options)
        compiled = jit_run(kernel, *args, grid=grid, warmup=True, **options)
        launched.append(CompiledLaunch(kernel.fn.__name__, tuple(grid), card, compiled))

    device_driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", card.arch, 32),
        get_current_device=lambda: card,  # kernels keep what is compiled by device
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: card.device,
    )
    with ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", run),
            (StandIn, "card", card),
            (torch.cuda, "get_device_capability", lambda device=None: card.capability),
            (torch.cuda, "get_device_properties", lambda device=None: card.properties()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.dict(vars(driver)))  # set_active cannot be undone otherwise
        driver.set_active(device_driver)
        stack.enter_context(_Operations())
        yield launched


def launches(
    wrapper: Callable[..., Any], *args: Any, card: Card = H100, **kwargs: Any
) -> list[CompiledLaunch]:
    """What `wrapper(*args, **kwargs)` launches, compiled for `card`. Tensors among the arguments,
    and within tuples and lists there, are replaced by stand-ins: they may be on any device, "meta"
    too."""
    with simulated(card) as launched:
        args, kwargs = tree_map_only(torch.Tensor, stand_in, (args, kwargs))
        wrapper(*args, **kwargs)
    return launched


def run_compiler(code: str, cache: Path) -> str:
    """What Python code prints that runs in a process where Triton compiles. It imports this
    checkout's `nanovllm` and `helpers`; `cache` is a directory for what is compiled."""
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if process.returncode:
        raise RuntimeError(process.stderr)
    return process.stdout
