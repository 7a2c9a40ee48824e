"""How much memory is there for the KV cache, and the way from the host's to the device's."""

import os
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

# Set aside on a GPU: CUDA Graphs, workspaces of libraries, fragmentation.
GPU_RESERVE = 512 * 2**20


def available_host_memory() -> int:
    """Bytes of main memory that could be taken without swapping; 4 GiB where that is unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return min(int(line.split()[1]) * 1024, _available_in_container())
    except OSError:
        pass
    try:  # macOS, BSD: all memory; half of it is a careful guess
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or in main memory for a CPU."""
    if device.type == "cpu":
        return available_host_memory()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def total_gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, free or not."""
    return torch.cuda.mem_get_info(device)[1]


class _CgroupFiles(NamedTuple):
    """Where a version of control groups has its numbers, all in bytes.

    Attributes:
        root: the directory of the outermost group.
        limit, usage: names of files; the usage includes cached files.
        cache: the entry of memory.stat with cached files that nobody has used of late. The kernel
            drops them when memory is wanted.
    """

    root: str
    limit: str
    usage: str
    cache: str


_CGROUP_1 = _CgroupFiles(
    "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_CGROUP_2 = _CgroupFiles("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _available_in_container() -> int:
    """What the limits of this process's control group, and of all groups around it, leave."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        lines = ["0::/"]
    available = 2**63
    for line in lines:  # hierarchy:controllers:path, without controllers for version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _CGROUP_1 if controllers else _CGROUP_2
        group = PurePosixPath(files.root + path)
        if ".." in group.parts:  # outside of what is visible here
            group = PurePosixPath(files.root)
        for directory in (group, *group.parents):
            if directory.is_relative_to(files.root):
                available = min(available, _available_in_group(str(directory), files))
    return max(0, available)


def _available_in_group(directory: str, files: _CgroupFiles) -> int:
    """What a group's limit leaves. Without one, or where the group cannot be seen, as from inside
    some containers, that is 2**63."""
    try:
        with open(f"{directory}/{files.limit}", encoding="ascii") as file:
            limit = int(file.read())  # "max" is no limit
        with open(f"{directory}/{files.usage}", encoding="ascii") as file:
            usage = int(file.read())
    except (OSError, ValueError):
        return 2**63
    return limit - max(0, usage - _cached_files(f"{directory}/memory.stat", files.cache))


def _cached_files(path: str, entry: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(" ")
                if name == entry:
                    return int(value)
    except (OSError, ValueError):
        pass
    return 0


def to_device(
    values: list[int] | list[float] | np.ndarray, device: torch.device, dtype: type = np.int64
) -> torch.Tensor:
    """[number of values] of a NumPy dtype, copied without waiting for the device."""
    host = torch.from_numpy(np.array(values, dtype=dtype))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def gpu_memory_in_use(device: torch.device) -> int:
    """Bytes of the GPU's memory that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free
