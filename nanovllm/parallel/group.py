"""What the ranks say to each other, inside a step and before the first.

Sums that fit into a slot of peer memory take one kernel of this project's own; all else goes
through NCCL, or gloo on CPUs. Groups are objects, not torch's global ones: an engine in one process
knows nothing of another.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.parallel.part_copies import PartCopies
from nanovllm.parallel.peer_memory import Peers, connect_peers
from nanovllm.utils.kernels import kernels

HOST = "127.0.0.1"
TIMEOUT = 300  # seconds that a rank waits for another
_PATIENCE = 10  # seconds for what should take none
_POLL_INTERVAL = timedelta(seconds=0.5)  # of looks whether a wait was aborted
# NCCL's and torch's settings, for this project's groups only: no NVLink multicast, and no watchdog
# that ends the process, which is the caller's.
_SETTINGS = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}  # fmt: skip
_LARGEST_PUSH = 8 * 2**20  # bytes that a rank writes to the others in one of the own kernels


class Group:
    """One rank's end of all conversations. Every rank must call the same methods in the same order.

    Args:
        store: reached by all ranks; used while groups are built.
        rank, size: this one's number, and how many there are.
        device: of this rank.
        dtype: of the model, for the sums inside a step.
        max_rows: of a decode step.
        max_tokens: of a prefill step.
        hidden_size: of the model.

    Attributes:
        peers: for sums inside a step; None on CPUs, and where GPUs do not reach each other's
            memory.
        winner_peers: the same for sampled tokens.
        copies: for larger sums, of two ranks; None as `peers`.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int,
        max_tokens: int,
        hidden_size: int,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.peers: Peers | None = None
        self.winner_peers: Peers | None = None
        self.copies: PartCopies | None = None
        self._close_peers = lambda: None
        self._lock = threading.Lock()
        self._aborting: threading.Thread | None = None
        timeout = timedelta(seconds=TIMEOUT)
        if device.type == "cpu":
            # All must be here before gloo's constructor, which waits for them with the GIL held.
            store.set(f"here/{rank}", "")
            store.wait([f"here/{other}" for other in range(size)], timeout)
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=HOST)]
            options._timeout = timeout
            self._backend: Any = gloo(store, rank, size, options)
            return
        with torch.cuda.device(device):
            with _settings():
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._backend = dist.ProcessGroupNCCL(store, rank, size, options)
                self.least(0)  # NCCL connects
            if kernels is not None:
                sizes = [(dtype, _LARGEST_PUSH // (size - 1)), (torch.int64, 8 * max_rows)]
                found = connect_peers(store, rank, size, device, sizes, self.least)
                if found is not None:
                    (self.peers, self.winner_peers), self._close_peers = found
                    if size == 2:
                        capacity = max(max_tokens, max_rows) * hidden_size
                        self.copies = PartCopies(store, self.peers, device, capacity)
                        self.least(0)  # nobody writes before all are there

    @classmethod
    def of_config(cls, config: Config, store: dist.Store, rank: int) -> "Group":
        """That of an engine."""
        return cls(
            store, rank, config.tensor_parallel_size, config.torch_device, config.torch_dtype,
            config.max_num_seqs, config.max_num_batched_tokens, config.model_config.hidden_size,
        )  # fmt: skip

    def peers_for(self, x: torch.Tensor) -> Peers | None:
        """Those with whom to sum up a tensor by the own kernel; None if another way is better."""
        fits = self.peers is not None and x.numel() <= self.peers.capacity
        return self.peers if fits else None

    def copies_for(self, x: torch.Tensor) -> PartCopies | None:
        """By what to put the summands of a tensor side by side; None if another way is better."""
        if self.copies is None or x.numel() > self.copies.capacity:
            return None
        return None if torch.cuda.is_current_stream_capturing() else self.copies

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        peers = self.peers_for(x)
        if peers is not None and x.dtype == peers.dtype:
            kernels.all_reduce(x, peers)
        else:
            self._all_reduce(x, dist.ReduceOp.SUM)
        return x

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of the ranks' values, in place."""
        self._all_reduce(x, dist.ReduceOp.MAX)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *shape of x]: x of all ranks."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        options = dist.distributed_c10d.AllgatherOptions()
        options.asyncOp = False
        self._wait(self._backend._allgather_base(out, x.contiguous(), options))
        return out.view(self.size, *x.shape)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """[size, ...] -> [size, ...]: entry r goes to rank r, where it is entry `rank`."""
        x = x.contiguous()
        out = torch.empty_like(x)
        options = dist.AllToAllOptions()
        options.asyncOp = False
        self._wait(self._backend.alltoall_base(out, x, [], [], options))
        return out

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers. Waits for all of them."""
        found = torch.tensor([number], device=self.device)
        self._all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def abort(self) -> None:
        """Let everything that waits for another rank give up. From any thread; waits for nothing.

        NCCL's abort waits itself until all CUDA Graphs with its calls are gone, which the thread
        that owns them may do only later.
        """
        for peers in (self.peers, self.winner_peers):
            if peers is not None:
                peers.abort.fill_(1)
        with self._lock:
            if self._aborting is None:
                self._aborting = threading.Thread(target=self._backend.abort, daemon=True)
                self._aborting.start()

    def close(self) -> None:
        """Give memory back, when the graphs are gone. Calling it again does nothing."""
        self.abort()
        assert self._aborting is not None
        self._aborting.join(_PATIENCE)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.synchronize()
                if self.copies is not None:
                    self.copies.close()
                    self.copies = None
                self._close_peers()

    def _all_reduce(self, x: torch.Tensor, op: Any) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        options.asyncOp = False
        self._wait(self._backend.allreduce([x], options))

    def _wait(self, work: Any) -> None:
        """On a GPU, let the stream wait. On a CPU, wait here, at most until `abort`: gloo may not
        notice that the other rank is gone, and would then wait for its whole timeout."""
        if self.device.type == "cuda":
            if work is not None:
                work.wait()
            return
        while True:
            try:
                work.wait(_POLL_INTERVAL)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises its own error, if it has one: it may just have ended
                    return
                if self._aborting is not None:
                    # Its destructor would wait for the calls that have begun: it is never dropped.
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._backend))
                    raise RuntimeError("another rank is gone") from None


@contextmanager
def _settings() -> Iterator[None]:
    """Environment variables for the time in which a group is built; what is set already stays."""
    added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
