"""Kernels compiled ahead of their first launch, several at a time.

Triton compiles a kernel when it is first launched with arguments of some kind, and everything waits
for it: 0.2 to 0.6 s each, some 60 of them for all batch sizes of a model. Most of that time is
spent outside of Python, so threads can share it.

    with compiler.ahead():      # launches of kernels that are not compiled yet only compile them
        run_a_step()
    with compiler.on_demand():  # takes what is there, waits for what is under way
        run_a_step()
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from triton.runtime._async_compile import active_mode

_MOST_THREADS = 8


class Compiler:
    """Of one GPU's kernels, in place of a `triton.AsyncCompileMode`, which would launch what it
    compiles. One thread at a time enters its modes.

    Args:
        device: that the kernels are loaded to, as soon as they are compiled.
    """

    def __init__(self, device: torch.device) -> None:
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._device = device
        self._executor = ThreadPoolExecutor(threads, "compile")
        self._ahead: dict[str, Future] = {}  # by Triton's key
        self._only_compiles = False

    def ahead(self) -> AbstractContextManager[None]:
        """A context in which launches return at once, and launch nothing that is not compiled."""
        return self._active(only_compiles=True)

    def on_demand(self) -> AbstractContextManager[None]:
        """A context in which launches find what was compiled ahead."""
        return self._active(only_compiles=False)

    def close(self) -> None:
        """Compile nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def submit(
        self,
        key: str,
        compile_fn: Callable[[], Any],
        finalize_fn: Callable[[Any], None],
        *_: Any,
    ) -> Any:
        """Called by Triton for a kernel that it does not know yet: returns the kernel, or None if
        it is not to be launched now."""
        ahead = self._ahead.get(key)
        if self._only_compiles and (ahead is None or not ahead.done()):
            if ahead is None:
                self._ahead[key] = self._executor.submit(self._compile_and_load, compile_fn)
            return None
        kernel = None
        if ahead is not None and not ahead.cancel():  # it is there, or under way
            with suppress(CancelledError):
                kernel = ahead.result()
        kernel = compile_fn() if kernel is None else kernel
        finalize_fn(kernel)
        return kernel

    def _compile_and_load(self, compile_fn: Callable[[], Any]) -> Any:
        if not threading.main_thread().is_alive():
            raise CancelledError  # the program ends, and waits for this
        kernel = compile_fn()
        with torch.cuda.device(self._device):
            _ = kernel.run  # the property loads it
        return kernel

    @contextmanager
    def _active(self, only_compiles: bool) -> Iterator[None]:
        before = self._only_compiles
        token = active_mode.set(self)  # type: ignore[arg-type]
        self._only_compiles = only_compiles
        try:
            yield
        finally:
            active_mode.reset(token)
            self._only_compiles = before
