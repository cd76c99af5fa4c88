"""What a device is and how fast: its name, its memory, its dense bf16 rate as published and as a matrix product has it.

The published rates are those of tensor cores without sparsity that add up in float32. A share of such a rate is what is
called model FLOPs utilisation: operations that the work needs, by what the device could have done in that time.
"""

import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

DENSE_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "RTX A6000": 155.0,
}
"""By a part of the name; of several that fit the first counts."""

PRODUCT_SIDE, SMALL_PRODUCT_SIDE = 8192, 512
REPEATS = 20


def published_tflops(name: str) -> float | None:
    """The dense bf16 rate of a card by its name, or None where it is not in the table."""
    words = name.replace("-", " ").split()
    fitting = (rate for part, rate in DENSE_BF16_TFLOPS.items() if _has(words, part.split()))
    return next(fitting, None)


def _has(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words)))


def measured_tflops(device: torch.device) -> float:
    """Of a large square product: bf16 on a GPU; float32 and small on a processor."""
    is_gpu = device.type == "cuda"
    side, dtype = (PRODUCT_SIDE, torch.bfloat16) if is_gpu else (SMALL_PRODUCT_SIDE, torch.float32)
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right, device, repeats=REPEATS) / 1e12


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader of the numbers must know of the machine."""
    found: dict[str, Any] = {
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        found |= {"device": name, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"memory_gib": total / 2**30, "free_gib": free / 2**30, "published_tflops": published_tflops(name)}
    return found | {"measured_tflops": measured_tflops(device)}


def clock(device: torch.device) -> float:
    """Seconds, at which a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Median seconds of some work, after two runs that do not count."""
    for _ in range(2):
        work()
    found = list[float]()
    for _ in range(repeats):
        started = clock(device)
        work()
        found.append(clock(device) - started)
    return median(found)
