"""How much memory is there for the KV cache, and the way from the host's to the device's."""

import os

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


def _available_in_container() -> int:
    """What the limit of this control group (version 2) leaves."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())  # "max" is no limit
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            return limit - int(file.read())
    except (OSError, ValueError):
        return 2**63


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
