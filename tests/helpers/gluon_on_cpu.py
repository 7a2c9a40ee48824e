"""Gluon kernels for Hopper as plain Python on a CPU: their arithmetic, memory and barriers.

    kernel = emulated(Path("nanovllm/kernels/prefill_hopper.py"))
    kernel.prefill_on_hopper(...)

The file runs as it is, with stand-ins for Gluon's modules whose operations are torch's. The parts
that `warp_specialize` starts are threads of which one runs at a time. It goes on until it waits for
a barrier, or until one that comes before it in the order of preference can go on. So a run is the
same each time, and parts that all wait are an error at once.

A GPU may make a copy or a product at any time between what issues it and what waits for it. In a
`Schedule` all are as early or as late as that, so that a missing wait shows:

- writers first: the parts that load run before the others, copies are there at once, and products
  read their operands when they are waited for. Memory that was released too early is overwritten.
- readers first: the other way round. Memory that was read too early has something else.

What was never written is NaN. It knows nothing of layouts, of fences between a thread's accesses
and those of copies and products, nor of threads within a part.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

# Not to be imported while Gluon's modules are exchanged.
from nanovllm.kernels import launch, paged_cache, prefill_plan  # noqa: F401

_NAN = float("nan")
_PANEL = 64  # columns of 2 bytes: the 128 bytes that are swizzled together


class Schedule(NamedTuple):
    """Which part of a program goes on if several can, the first of `order`, and when copies and
    products are made."""

    order: tuple[int, ...]
    writers_first: bool


# For two parts that attend and a third that loads.
SCHEDULES = (
    Schedule((2, 0, 1), True), Schedule((0, 1, 2), False), Schedule((2, 1, 0), True),
    Schedule((1, 0, 2), False), Schedule((0, 2, 1), True),
)  # fmt: skip


def emulated(path: Path, changes: dict[str, str] | None = None) -> ModuleType:
    """The module in a file, for a CPU.

    Args:
        changes: text of the file that is exchanged, to see what a fault would do.
    """
    source = path.read_text()
    for text, other in (changes or {}).items():
        assert text in source, f"{path.name} does not contain {text!r}"
        source = source.replace(text, other)
    module = ModuleType(path.stem)
    with mock.patch.dict(sys.modules, _gluon_modules()):
        exec(compile(source, str(path), "exec"), vars(module))
    return module


class _Stopped(BaseException):
    """Ends the other parts of a program, one of which has failed."""


class _Program:
    """One program of a launch, and its parts, of which one runs at a time: whose turn it is has the
    lock."""

    def __init__(self, number: int, programs: int) -> None:
        self.number, self.programs = number, programs
        self.schedule = SCHEDULES[number % len(SCHEDULES)]
        self.lock = threading.Condition()
        self.waiting: dict[int, Callable[[], bool]] = {}  # what each part needs to go on
        self.turn: int | None = None
        self.failure: BaseException | None = None

    def run_parts(self, functions: list[tuple[Any, tuple]], warps: list, registers: list) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        threads = [
            threading.Thread(target=self._run_part, args=(part, *function))
            for part, function in enumerate(functions)
        ]
        self.waiting = {part: lambda: True for part in range(len(threads))}
        with self.lock:
            self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run that come first, and all while this part is not ready."""
        self.waiting[_current.part] = ready
        self._choose()
        self._wait_for_turn()

    def _run_part(self, part: int, function: Any, arguments: tuple) -> None:
        _current.program, _current.part, _current.products = self, part, []
        with self.lock:
            try:
                self._wait_for_turn()
                function(*arguments)
                assert not _current.products, "products that nobody waits for"
                self._choose()
            except _Stopped:
                pass
            except BaseException as failure:
                self.failure = failure
            self.lock.notify_all()

    def _choose(self) -> None:
        ready = (one for one in self.schedule.order if one in self.waiting and self.waiting[one]())
        self.turn = next(ready, None)
        if self.turn is None and self.waiting and self.failure is None:
            self.failure = RuntimeError(f"parts {[*self.waiting]} wait for ever")
        self.lock.notify_all()

    def _wait_for_turn(self) -> None:
        self.lock.wait_for(lambda: self.turn == _current.part or self.failure is not None)
        if self.failure is not None:
            raise _Stopped
        del self.waiting[_current.part]


class _Current(threading.local):
    """What a thread runs, and the products that it has issued and not waited for."""

    program: _Program
    part: int
    products: list["_Product"]


_current = _Current()


class Barrier:
    """An mbarrier: arrivals that are missing, bytes, and copies that are not made yet."""

    def __init__(self) -> None:
        self.phase = self.count = self.missing = self.bytes = 0
        self.copies: list[Callable[[], int]] = []

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def expect(self, num_bytes: int) -> None:
        self.bytes += num_bytes
        self.arrive(1)

    def arrive(self, count: int) -> None:
        self.missing -= count
        assert self.missing >= 0, "more arrivals than the barrier counts"
        self._settle()
        _current.program.pause()

    def add(self, copy: Callable[[], int]) -> None:
        """A copy, which returns its bytes."""
        self.copies.append(copy)
        if _current.program.schedule.writers_first:
            self._make_copies()
        _current.program.pause()

    def wait(self, phase: int) -> None:
        _current.program.pause(lambda: self._has_passed(phase))

    def _has_passed(self, phase: int) -> bool:
        self._make_copies()
        return self.phase & 1 != phase

    def _make_copies(self) -> None:
        while self.copies:
            self.bytes -= self.copies.pop(0)()
            assert self.bytes >= 0, "more bytes than the barrier expects"
            self._settle()

    def _settle(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers(list):
    index = list.__getitem__


class SharedMemory:
    """Matrices of any number of rows, each as panels of 64 columns, row after row.

    Args:
        memory: [matrices, panels, rows, 64], or one matrix of them.
    """

    def __init__(self, memory: torch.Tensor, is_transposed: bool = False) -> None:
        self.memory, self.is_transposed = memory, is_transposed
        self.dtype = memory.dtype

    @property
    def shape(self) -> list[int]:
        *matrices, panels, rows, columns = self.memory.shape
        return [*matrices, rows, panels * columns]

    def index(self, i: int) -> "SharedMemory":
        return SharedMemory(self.memory[i])

    def permute(self, order: tuple[int, int]) -> "SharedMemory":
        assert order == (1, 0)
        return SharedMemory(self.memory, True)

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: None) -> "SharedMemory":
        matrices, rows, columns = shape
        assert columns == _PANEL and dtype == self.dtype
        return SharedMemory(self.memory.view(matrices, 1, rows, columns))

    def load(self, layout: None = None) -> torch.Tensor:
        matrix = self.memory.transpose(0, 1).flatten(1).clone()
        return matrix.T if self.is_transposed else matrix

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype
        self.memory.copy_(value.view(len(value), -1, _PANEL).transpose(0, 1))


class Descriptor(NamedTuple):
    """A matrix, and the sizes of what is copied of it at a time."""

    matrix: torch.Tensor
    block: tuple[int, int]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


class Pointer(NamedTuple):
    """To an element of a tensor, or with a tensor in place of `at` to several."""

    memory: torch.Tensor
    at: Any = 0

    def __add__(self, offset: Any) -> "Pointer":  # type: ignore[override]
        return Pointer(self.memory, self.at + offset)


class Scalar(int):
    def to(self, dtype: torch.dtype) -> "Scalar":
        return self


class Scores(torch.Tensor):
    """What comes of a product: kernels ask for its layout."""

    type = SimpleNamespace(layout=None)


class _Product:
    """One that was issued: a @ b, added to what is there."""

    def __init__(self, a: Any, b: SharedMemory, to: Any) -> None:
        self.a, self.b, self.to = a, b, to
        self.value: torch.Tensor | None = None

    def make(self) -> None:
        if self.value is None:
            a = self.a.load() if isinstance(self.a, SharedMemory) else self.a
            self.value = (a.float() @ self.b.load().float() + self.to).as_subclass(Scores)


def _issue_product(
    a: Any, b: SharedMemory, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False
) -> _Product:
    assert is_async
    product = _Product(a, b, acc if use_acc else 0)
    _current.products.append(product)
    if not _current.program.schedule.writers_first:
        product.make()
    _current.program.pause()
    return product


def _wait_for_products(num_outstanding: int, deps: tuple) -> Any:
    _current.program.pause()
    while len(_current.products) > num_outstanding:
        _current.products.pop(0).make()
    for one in deps:
        assert one not in _current.products, "waits for too few products"
    found = tuple(one.value if isinstance(one, _Product) else one for one in deps)
    return found[0] if len(found) == 1 else found


def _copy(source: Descriptor, at: list[int], barrier: Barrier, to: SharedMemory) -> None:
    def copy() -> int:
        (row, column), (rows, columns) = at, source.block
        assert 0 <= row < len(source.matrix) and 0 <= column < source.matrix.shape[1], at
        inside = source.matrix[row : row + rows, column : column + columns]
        block = torch.zeros(source.block, dtype=source.dtype)
        block[: len(inside), : inside.shape[1]] = inside
        to.store(block)
        return block.numel() * block.element_size()

    barrier.add(copy)


def _allocate(dtype: torch.dtype, shape: list[int], layout: str | None) -> Any:
    matrices, *sizes = shape
    if layout == "barriers":
        return Barriers(Barrier() for _ in range(matrices))
    rows, columns = sizes
    memory = torch.full((matrices, columns // _PANEL, rows, _PANEL), _NAN, dtype=dtype)
    return SharedMemory(memory)


def _load(pointer: Pointer) -> Scalar:
    assert 0 <= pointer.at < len(pointer.memory), "a read past the end"
    return Scalar(pointer.memory[pointer.at])


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    at, mask = torch.broadcast_tensors(pointer.at, mask)
    assert value.shape == at.shape
    pointer.memory[at[mask]] = value[mask].to(pointer.memory.dtype)


def _where(condition: Any, value: Any, other: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, value, other)
    return value if condition else other


def _maximum(a: torch.Tensor, b: Any) -> torch.Tensor:
    return torch.maximum(a, torch.as_tensor(b, dtype=a.dtype))


class Kernel:
    """A function of Gluon, called by others or launched. Programs run one after the other, each by
    the next of the SCHEDULES."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            pointers = [
                Pointer(one.view(-1)) if isinstance(one, torch.Tensor) else one for one in arguments
            ]
            for number in range(*grid):
                _current.program = _Program(number, *grid)
                self.function(*pointers, **constants)

        return run


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Kernel if function is None else Kernel(function)


def _no_layout(*sizes: Any, **options: Any) -> None:
    return None


def _gluon_modules() -> dict[str, Any]:
    """By name, as `import` finds them."""
    language = SimpleNamespace(
        constexpr=lambda value: value, static_range=range, float32=torch.float32, int64=torch.int64,
        program_id=lambda axis: _current.program.number,
        num_programs=lambda axis: _current.program.programs,
        load=_load, store=_store, allocate_shared_memory=_allocate, barrier=lambda: None,
        shared_memory_descriptor=SharedMemory,
        warp_specialize=lambda *arguments: _current.program.run_parts(*arguments),
        NVMMADistributedLayout=_no_layout, NVMMASharedLayout=_no_layout, SliceLayout=_no_layout,
        DotOperandLayout=_no_layout, BlockedLayout=_no_layout,
        convert_layout=lambda values, layout: values,
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        expand_dims=lambda values, axis: values.unsqueeze(axis), where=_where, minimum=min,
        maximum=_maximum, max=lambda values, axis: values.amax(axis),
        sum=lambda values, axis: values.sum(axis), exp2=torch.exp2,
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=Barrier.init, expect=Barrier.expect,
        wait=Barrier.wait, arrive=Barrier.arrive,
    )  # fmt: skip
    hopper = SimpleNamespace(
        mbarrier=mbarrier, tma=SimpleNamespace(async_load=_copy), fence_async_shared=lambda: None,
        warpgroup_mma=_issue_product, warpgroup_mma_wait=_wait_for_products,
    )  # fmt: skip
    gluon = SimpleNamespace(jit=_jit, language=language)
    descriptor = SimpleNamespace(from_tensor=Descriptor)
    return {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=descriptor),
    }
