"""A rank that waits for another gives up when it is told to."""

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from helpers.paths import ROOT
from nanovllm.parallel import group
from nanovllm.parallel.group import HOST, Group

# A rank that is there, and then says no more.
SILENT = """
import sys, time, torch, torch.distributed as dist
from nanovllm.parallel.group import HOST, Group

store = dist.TCPStore(HOST, int(sys.argv[1]), 2, is_master=False)
here = Group(store, 1, 2, torch.device("cpu"), torch.float32, 1, 1, 1)
time.sleep(60)
"""


def first_rank(store: dist.Store) -> Group:
    return Group(store, 0, 2, torch.device("cpu"), torch.float32, 1, 1, 1)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    monkeypatch.setattr(group, "TIMEOUT", 20)
    return dist.TCPStore(HOST, 0, 2, is_master=True, wait_for_workers=False)


def test_abort_ends_a_wait_for_a_rank_whose_end_gloo_has_missed(store: dist.TCPStore):
    command = [sys.executable, "-c", SILENT, str(store.port)]
    with subprocess.Popen(command, cwd=ROOT) as other:
        try:
            ours = first_rank(store)
            start = time.monotonic()
            threading.Timer(0.2, ours.abort).start()
            with pytest.raises(RuntimeError, match="another rank is gone"):
                ours.all_reduce(torch.ones(3))
            ours.close()
            del ours
            gc.collect()
            assert time.monotonic() - start < 3
        finally:
            other.kill()


class Work:
    """What ends just after a wait for it was given up, well or with an error of its own."""

    def __init__(self, error: RuntimeError | None) -> None:
        self.errors = [RuntimeError("Operation timed out!"), error]

    def wait(self, *_: object) -> None:
        if (error := self.errors.pop(0)) is not None:
            raise error

    def is_completed(self) -> bool:
        return True


def test_a_sum_that_ends_as_its_wait_is_given_up_counts():
    ours = Group.__new__(Group)
    ours.device, ours._aborting = torch.device("cpu"), None
    ours._wait(Work(None))
    with pytest.raises(RuntimeError, match="connection closed"):
        ours._wait(Work(RuntimeError("connection closed")))


def test_other_threads_run_while_a_rank_waits_for_the_others_to_start(store: dist.TCPStore):
    group.TIMEOUT = 2
    errors: list[Exception] = []

    def build() -> None:
        try:
            first_rank(store)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=build)
    start = time.monotonic()
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive() and time.monotonic() - start < 1
    thread.join()
    assert "here/1" in str(errors[0])
