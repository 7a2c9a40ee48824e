"""What was compiled ahead is found, what is under way is waited for, the rest is compiled now."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime._async_compile import active_mode

from nanovllm.kernels.compiling import Compiler


class Compile:
    """A compilation that takes until `may_end` is set, and where it was finished."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_end, self.error = threading.Event(), error
        self.threads: list[threading.Thread] = []
        self.finished: list[object] = []
        self.kernel = SimpleNamespace(run=None)

    def __call__(self) -> object:
        self.threads.append(threading.current_thread())
        assert self.may_end.wait(20)
        if self.error is not None:
            raise self.error
        return self.kernel


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    compiler = Compiler(torch.device("cuda", 0))
    yield compiler
    compiler.close()


def test_kernels_compiled_ahead_are_taken_in_the_order_of_need(compiler: Compiler) -> None:
    ready, waited_for, far_away = Compile(), Compile(), Compile()
    with compiler.ahead():
        for key, compile in (("a", ready), ("b", waited_for), ("c", far_away)):
            assert compiler.submit(key, compile, compile.finished.append) is None
        assert compiler.submit("b", waited_for, ready.finished.append) is None, "once is enough"
        ready.may_end.set()
        while (found := compiler.submit("a", ready, ready.finished.append)) is None:
            time.sleep(0.01)
        assert found is ready.kernel, "what is there is launched"
    far_away.may_end.set()
    with compiler.on_demand():
        # The one thread is at the second now. Nobody waits for it to get to the third.
        found = compiler.submit("c", far_away, far_away.finished.append)
        assert found is far_away.kernel and far_away.finished == [found]
        assert far_away.threads == [threading.current_thread()]
        waited_for.may_end.set()
        assert compiler.submit("b", waited_for, waited_for.finished.append)
    assert threading.current_thread() not in ready.threads + waited_for.threads
    assert len(ready.threads) == len(waited_for.threads) == 1
    assert ready.finished == [ready.kernel] and waited_for.finished == [waited_for.kernel]


def test_an_error_comes_when_the_kernel_is_needed(compiler: Compiler) -> None:
    broken = Compile(ValueError("no such instruction"))
    broken.may_end.set()
    with compiler.ahead():
        assert compiler.submit("a", broken, broken.finished.append) is None
        with compiler.on_demand(), pytest.raises(ValueError, match="no such instruction"):
            compiler.submit("a", broken, broken.finished.append)
        assert compiler.submit("b", broken, broken.finished.append) is None, "still ahead"
    assert not broken.finished


def test_modes_hold_for_one_thread_and_end(compiler: Compiler) -> None:
    found = []
    with compiler.ahead():
        assert active_mode.get() is compiler
        thread = threading.Thread(target=lambda: found.append(active_mode.get()))
        thread.start()
        thread.join()
    assert found == [None] and active_mode.get() is None


@triton.jit
def add_kernel(x_ptr, number: tl.constexpr):
    tl.store(x_ptr, tl.load(x_ptr) + number)


@pytest.mark.gpu
def test_a_launch_ahead_launches_nothing_gpu() -> None:
    compiler = Compiler(torch.device("cuda", 0))
    x = torch.zeros(1, device="cuda")
    with compiler.ahead():
        for number in range(100, 105):
            add_kernel[(1,)](x, number)
    assert x.item() == 0
    with compiler.on_demand():
        for number in range(100, 105):
            add_kernel[(1,)](x, number)
    assert x.item() == sum(range(100, 105))
    assert len(compiler._ahead) == 5
    compiler.close()
