"""How long a user waits for a command's first answer.

    python scripts/bench_start.py            # medians of 7 starts each, warm
    python scripts/bench_start.py --starts 3

Every start is a process of its own. The first one of each kind fills the caches and is not counted. Columns: the median
and the slowest in seconds, and the median as a multiple of the time that Python alone takes to start and import torch,
which no run can do without.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

TRAIN = ("-m", "iapt.cli.train")
# What is started, and the stream whose first line is waited for; None: the end of the process.
STARTS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "import torch": (("-c", "import torch"), None),
    "iapt-train --help": ((*TRAIN, "--help"), None),
    "iapt-train --cfg job": ((*TRAIN, "--cfg", "job"), None),
    "iapt-eval --help": (("-m", "iapt.cli.eval", "--help"), None),
    "iapt-report --help": (("-m", "iapt.cli.report", "--help"), None),
    "a run's first line": (TRAIN, "stderr"),
    "a run's first line about its data": (TRAIN, "stdout"),
}


def seconds(arguments: Sequence[str], stream: str | None) -> float:
    """Until the process ended, or wrote the first line to `stream`.

    Raises:
        RuntimeError: it ended without what was waited for.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        out, err = (subprocess.PIPE if name == stream else subprocess.DEVNULL for name in ("stdout", "stderr"))
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, text=True, stdout=out, stderr=err)
        arrived = process.wait() == 0 if stream is None else bool(getattr(process, stream).readline())
        took = time.perf_counter() - start
        process.kill()
        process.communicate()
    if not arrived:
        raise RuntimeError(f"{' '.join(arguments)} failed")
    return took


def main() -> None:
    """Start everything `--starts` times and print a line for each kind of start."""
    parser = argparse.ArgumentParser(description="how long a user waits for a command's first answer")
    parser.add_argument("--starts", type=int, default=7, help="counted starts of each kind (default 7)")
    count = parser.parse_args().starts
    print(f"{'':36}{'median s':>10}{'slowest s':>11}{'x torch':>9}")
    unit = None
    for name, (arguments, stream) in STARTS.items():
        seconds(arguments, stream)
        times = [seconds(arguments, stream) for _ in range(count)]
        median = statistics.median(times)
        unit = unit or median
        print(f"{name:36}{median:10.2f}{max(times):11.2f}{median / unit:9.2f}", flush=True)


if __name__ == "__main__":
    main()
