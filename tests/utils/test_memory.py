"""How much memory there is, and the way of numbers to the device."""

import io
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.utils import memory
from nanovllm.utils.memory import available_host_memory, to_device

KIB = 1024


def files(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    """Let the module find these files, by the last part of their names, and no others."""

    def open_(path: str, *_: Any, **__: Any) -> io.StringIO:
        name = path.rpartition("/")[2].replace(".", "_")
        if name not in contents:
            raise FileNotFoundError(path)
        return io.StringIO(contents[name])

    monkeypatch.setattr(memory, "open", open_, raising=False)


MEMINFO = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n"


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"meminfo": MEMINFO}, 5000 * KIB),  # no control group
        ({"meminfo": MEMINFO, "memory_max": "max\n", "memory_current": "77\n"}, 5000 * KIB),
        ({"meminfo": MEMINFO, "memory_max": "3072000\n", "memory_current": "1024\n"}, 3070976),
        ({"meminfo": MEMINFO, "memory_max": "99999999\n", "memory_current": "1\n"}, 5000 * KIB),
    ],
    ids=["none", "unlimited", "limited", "wide"],
)
def test_a_container_may_have_less_than_the_machine(
    monkeypatch: pytest.MonkeyPatch, contents: dict[str, str], expected: int
):
    files(monkeypatch, **contents)
    assert available_host_memory() == expected


def test_without_a_proc_there_is_a_guess(monkeypatch: pytest.MonkeyPatch):
    files(monkeypatch)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)
    assert available_host_memory() == 4096 * 1000 // 2

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    assert available_host_memory() == 4 * 2**30


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, -2, 2**40], np.int64, torch.tensor([1, -2, 2**40])),
        ([0.5, 3], np.float32, torch.tensor([0.5, 3.0])),
        (np.array([7, 8], dtype=np.int32), np.int64, torch.tensor([7, 8])),
        ([], np.int64, torch.empty(0, dtype=torch.int64)),
    ],
    ids=["integers", "floats", "array", "none"],
)
def test_numbers_go_to_the_device_as_they_are(values: Any, dtype: type, expected: torch.Tensor):
    found = to_device(values, torch.device("cpu"), dtype)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_what_is_sent_is_a_copy():
    values = np.array([1, 2])
    found = to_device(values, torch.device("cpu"))
    values[0] = 9
    assert found.tolist() == [1, 2]
