"""How much memory there is, and the way of numbers to the device."""

import io
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.utils import memory
from nanovllm.utils.memory import available_host_memory, to_device

KIB, MIB, GIB = 2**10, 2**20, 2**30


def files(monkeypatch: pytest.MonkeyPatch, contents: dict[str, str]) -> None:
    """Let the module find these files, and no others."""

    def open_(path: str, *_: Any, **__: Any) -> io.StringIO:
        if path not in contents:
            raise FileNotFoundError(path)
        return io.StringIO(contents[path])

    monkeypatch.setattr(memory, "open", open_, raising=False)


def meminfo(available: int) -> dict[str, str]:
    lines = f"MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  {available // KIB} kB\n"
    return {"/proc/meminfo": lines}


def group_1(path: str, limit: int, usage: int, cached: int) -> dict[str, str]:
    """The files of a control group of version 1."""
    directory = f"/sys/fs/cgroup/memory{path}".rstrip("/")
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit}\n",
        f"{directory}/memory.usage_in_bytes": f"{usage}\n",
        f"{directory}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cached}\n",
    }


def group_2(path: str, limit: int | str, usage: int, cached: int | None = None) -> dict[str, str]:
    """The files of a control group of version 2."""
    directory = f"/sys/fs/cgroup{path}".rstrip("/")
    found = {f"{directory}/memory.max": f"{limit}\n", f"{directory}/memory.current": f"{usage}\n"}
    if cached is not None:
        found[f"{directory}/memory.stat"] = f"anon 5\nfile 99\ninactive_file {cached}\nslab 3\n"
    return found


def own(*lines: str) -> dict[str, str]:
    return {"/proc/self/cgroup": "".join(f"{line}\n" for line in lines)}


WIDE = meminfo(64 * GIB)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (meminfo(5000 * KIB), 5000 * KIB),
        (meminfo(5000 * KIB) | group_2("/", "max", 77), 5000 * KIB),
        (meminfo(5000 * KIB) | group_2("/", 99999999, 1), 5000 * KIB),
        (WIDE | group_2("/", 3072000, 1024), 3070976),
        (WIDE | group_2("/", 8 * GIB, 7 * GIB, cached=5 * GIB), 6 * GIB),
        (WIDE | group_2("/", 8 * GIB, 8 * GIB, cached=0), 0),
        (WIDE | group_2("/", 8 * GIB, 9 * GIB, cached=0), 0),
        (WIDE | group_2("/", 8 * GIB, GIB, cached=2 * GIB), 8 * GIB),
        (WIDE | own("4:memory:/") | group_1("/", 8 * GIB, 7 * GIB, cached=5 * GIB), 6 * GIB),
        (WIDE | own("4:memory:/") | group_1("/", 2**63 - 4096, 7 * GIB, cached=0), 64 * GIB),
    ],
    ids=[
        "none", "unlimited", "wider than the machine", "limited", "cached files are free", "full",
        "over", "more cached than used", "version 1", "version 1 unlimited",
    ],
)  # fmt: skip
def test_a_container_may_have_less_than_the_machine(
    monkeypatch: pytest.MonkeyPatch, contents: dict[str, str], expected: int
):
    files(monkeypatch, contents)
    assert available_host_memory() == expected


@pytest.mark.parametrize("place", ["/", "/a", "/a/b"])
def test_the_least_that_a_group_or_one_around_it_leaves(
    monkeypatch: pytest.MonkeyPatch, place: str
):
    limits = {path: 8 * GIB for path in ("/", "/a", "/a/b")} | {place: 4 * GIB}
    contents = WIDE | own("0::/a/b")
    for path, limit in limits.items():
        contents |= group_2(path, limit, 3 * GIB, cached=2 * GIB)
    files(monkeypatch, contents)
    assert available_host_memory() == 3 * GIB


@pytest.mark.parametrize("path", ["/docker/1234", "/../../host", "/a:b"])
def test_a_group_that_cannot_be_seen_has_the_limits_around_it(
    monkeypatch: pytest.MonkeyPatch, path: str
):
    files(monkeypatch, WIDE | own(f"0::{path}") | group_2("/", 2 * GIB, GIB))
    assert available_host_memory() == GIB


def test_only_hierarchies_with_memory_count(monkeypatch: pytest.MonkeyPatch):
    lines = ("5:cpu,cpuacct:/a", "4:hugetlb,memory:/b", "0::/c")
    contents = group_1("/a", GIB, 0, 0) | group_1("/b", 3 * GIB, MIB, MIB) | group_2("/b", GIB, 0)
    files(monkeypatch, WIDE | own(*lines) | contents)
    assert available_host_memory() == 3 * GIB


def test_without_a_proc_there_is_a_guess(monkeypatch: pytest.MonkeyPatch):
    files(monkeypatch, {})
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
