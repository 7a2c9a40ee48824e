"""The processes of the ranks from 1 on, as rank 0 sees them: started, fed, watched, ended.

Each is a Python process of its own that runs `parallel.worker`, and nothing of the caller's
program. Steps go to it through a socket, and what it has to say comes back. A thread watches: when
a rank ends, says that it has failed, or keeps the others waiting too long, all of them are ended,
and what rank 0 waits for gives up.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.step import LateRows, Step
from nanovllm.parallel.group import HOST, TIMEOUT

_T = TypeVar("_T")
_POLL = 0.5  # seconds between looks at how long rank 0 has been waiting
_PATIENCE = 30  # seconds for what should take none
READY = "ready"  # what a rank says when it can run steps; all else is why it cannot


class Ranks:
    """All ranks but this one.

    Args:
        config: of the engine, as rank 0 has it.

    Raises:
        ValueError: if there is no GPU for each of them.

    Attributes:
        store: by which the ranks find each other.
        num_threads: that each rank computes with on a CPU.
        failure: which rank has failed, and why; None as long as all is well.
        abort: called from another thread when a rank has failed: it must let go of whatever rank 0
            waits for.
    """

    def __init__(self, config: Config) -> None:
        self.size, self._pid = config.tensor_parallel_size, os.getpid()
        _check_devices(config.torch_device, self.size)
        self.num_threads = max(1, torch.get_num_threads() // self.size)
        self.failure: str | None = None
        self.abort: Callable[[], None] = lambda: None
        self.store = dist.TCPStore(HOST, 0, self.size, is_master=True, wait_for_workers=False)
        self._processes: dict[int, subprocess.Popen] = {}
        self._connections: dict[int, Connection] = {}
        self._waiting_since: float | None = None
        self._is_closing = self._is_looking = False
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self._ready: set[int] = set()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        try:
            for rank in range(1, self.size):
                self._start(rank, config)
        except BaseException:
            self._end(patience=0)
            raise
        self._watcher.start()

    @property
    def is_mine(self) -> bool:
        """Whether this process has started the ranks, and is no fork of that one."""
        return os.getpid() == self._pid

    def send(self, what: Step | LateRows, data: memoryview) -> None:
        """Let all ranks run a step, or sample rows of the last one once more.

        Args:
            data: of the step's host buffer what is in use; or the masks.
        """
        self.check()
        for rank, connection in self._connections.items():
            try:
                connection.send(what)
                connection.send_bytes(data)
            except (OSError, TypeError):  # the watcher may just have closed it
                self._has_ended(rank)
        self.check()

    def check(self) -> None:
        """Raises:
        RuntimeError: if a rank has failed, or has ended and nobody knows why yet.
        """
        is_looking = self._is_looking  # read first: `failure` is set before this turns False
        if self.failure is not None:
            raise RuntimeError(self.failure)
        if is_looking:
            raise RuntimeError("another rank has ended")

    def watched(self, function: Callable[[], _T]) -> _T:
        """Call a function that may wait for another rank, and give up if one has failed: for what
        `abort` does not reach."""
        results: list[_T] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while thread.is_alive() and self.failure is None:
            thread.join(0.02)
        if errors:
            raise errors[0]
        self.check()
        return results[0]

    def wait_until_ready(self) -> None:
        """Wait until all ranks can run steps."""
        with self._news:
            while len(self._ready) < self.size - 1 and self.failure is None:
                self._news.wait(_POLL)
        self.check()

    def waits(self, is_waiting: bool) -> None:
        """Rank 0 begins to wait for a step, or has ended to."""
        self._waiting_since = time.monotonic() if is_waiting else None

    def fail_with(self, error: BaseException) -> BaseException:
        """End all ranks for an error that rank 0 has met; returns what to raise. Most often another
        rank's failure is behind it, and known soon."""
        if not isinstance(error, Exception):  # Ctrl-C, and its like
            self._fail(f"rank 0 of {self.size} was interrupted in a step")
            return error
        since = time.monotonic()
        while self.failure is None:
            if time.monotonic() - since > (_PATIENCE if self._is_looking else 2):
                break
            time.sleep(0.01)
        self._fail(f"rank 0 of {self.size} failed: {type(error).__name__}: {error}")
        return RuntimeError(self.failure)

    def close(self) -> None:
        """End all processes. Calling it again does nothing; nor does a fork of this process."""
        if not self.is_mine:
            return
        with self._lock:
            self._is_closing = True
        for connection in self._connections.values():
            with suppress(OSError):
                connection.send(None)
        self._end(patience=10 if self.failure is None else 0)
        if threading.current_thread() is not self._watcher:
            self._watcher.join(_PATIENCE)  # it may still be busy with a failure

    def _start(self, rank: int, config: Config) -> None:
        ours, theirs = socket.socketpair()
        # Nothing of the caller's program is imported there, so it needs no guard.
        paths = [str(Path(__file__).parents[2]), *sys.path]  # this package, wherever it runs
        code = (
            f"import sys; sys.path[:] = {paths!r}; "
            f"from nanovllm.parallel.worker import main; main({theirs.fileno()})"
        )
        with theirs:
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for rank 0
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        connection = self._connections[rank] = Connection(ours.detach())
        options = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
        options |= {"model": str(config.model_dir), "tokenizer": None}
        if config.torch_device.type == "cuda":
            options["device"] = f"cuda:{(config.torch_device.index or 0) + rank}"
        connection.send((options, rank, self.store.port, self.num_threads))

    def _watch(self) -> None:
        """Until all connections have ended."""
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while ranks:
            ready: list[Any] = wait([*ranks], timeout=_POLL)
            for connection in ready:
                rank = ranks[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    del ranks[connection]
                    connection.close()
                    if not self._is_closing:
                        self._has_ended(rank)
                    continue
                if message == READY:
                    with self._news:
                        self._ready.add(rank)
                        self._news.notify_all()
                else:
                    self._fail(f"rank {rank} of {self.size} failed: {message}")
            since = self._waiting_since
            if since is not None and time.monotonic() - since > TIMEOUT:
                self._fail(f"a step has not ended after {TIMEOUT} s: some rank hangs")

    def _has_ended(self, rank: int) -> None:
        # Rank 0 may get an error at once because of this. It waits until the reason is known, since
        # a process that has a GPU may take a second or more to end.
        self._is_looking = True
        try:
            self.abort()  # before it is waited for: it may not end as long as a GPU waits for it
            self._fail(self._how_it_ended(rank))
        finally:
            self._is_looking = False

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self.failure is not None or self._is_closing:
                return
            self.failure = f"{reason}. All ranks have been ended: build a new LLM"
        try:
            self.abort()
        finally:
            self._end(patience=0)
            with self._news:
                self._news.notify_all()

    def _end(self, patience: float) -> None:
        """End the processes, after some seconds in which they may do it by themselves."""
        deadline = time.monotonic() + patience
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)

    def _how_it_ended(self, rank: int) -> str:
        name, process = f"rank {rank} of {self.size}", self._processes[rank]
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            return f"{name} does not answer"
        if code < 0:
            return f"{name} was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"{name} ended with exit status {code}"


def _check_devices(first: torch.device, size: int) -> None:
    if first.type == "cuda" and first.index + size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel_size={size} needs GPUs {first.index} to {first.index + size - 1}; "
            f"torch sees {torch.cuda.device_count()} CUDA devices"
        )
