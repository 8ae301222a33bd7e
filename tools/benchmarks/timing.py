"""How the benchmarks measure and record.

Seconds depend on the machine and on the hour. So what is compared runs in turns, and a
ratio is the median of the ratios within each round.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def seconds(function: Callable, *arguments) -> float:
    """The wall-clock time of one call, the GPU's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - start


def in_turns(functions: Sequence[Callable], rounds: int) -> list[list[float]]:
    """The times of each function. All run once in every round, after a first call."""
    for function in functions:
        function()
    turns = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [list(times) for times in zip(*turns, strict=True)]


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each round's time over the reference's time in the same round, sorted."""
    return sorted(a / b for a, b in zip(times, reference, strict=True))


def write_record(
    file: Path, tool: str, arguments: list[str] | None, device: str, what: dict
) -> None:
    """What was measured, with the command and the machine, as a JSON file."""
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(["python", f"tools/benchmarks/{tool}", *given]),
        "device": processor(device),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **what,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {file}")


def processor(device: str) -> str:
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(one.split(":")[1].strip() for one in lines if "model name" in one)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
