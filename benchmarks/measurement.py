"""Wall time and peak anonymous memory of a command, taken from outside: every tool is measured by the same code."""

import os
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

INTERVAL_S = 0.02
AGE_SCRIPT = "import sys; sys.path.insert(0, {here!r}); {imports}; import runner; print(runner.{figure}())"


@dataclass(frozen=True)
class Measurement:
    seconds: float
    cpu_seconds: float  # user and system time of the command and its children
    peak_rss_anon_bytes: int  # the largest sum over the command and its children, seen every 20 ms
    exit_code: int
    load_before: float  # the machine's load average over the last minute, before the start


def children(pid: int) -> list[int]:
    """The process and everything below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            listed = task.read_text().split()
        except OSError:  # the thread has ended since
            continue
        for child in listed:
            if command_line(int(child)) != command_line(pid):  # between fork and exec a child's memory is its parent's
                found += children(int(child))
    return found


def command_line(pid: int) -> bytes:
    """Empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def rss_anon_bytes(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command: list[str], environment: dict[str, str], log: IO[bytes]) -> Measurement:
    load = os.getloadavg()[0]
    cpu_before = cpu_seconds_of_children()
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(rss_anon_bytes(pid) for pid in children(process.pid)))
        time.sleep(INTERVAL_S)
    seconds = time.perf_counter() - started
    return Measurement(seconds, cpu_seconds_of_children() - cpu_before, peak, process.returncode, load)


def after_imports(python: Path | str, imports: str, figure: str, environment: dict[str, str]) -> float:
    """`process_age_s` or `rss_anon_bytes` of a fresh interpreter that has done nothing but these imports."""
    script = AGE_SCRIPT.format(here=str(Path(__file__).resolve().parent), imports=imports, figure=figure)
    done = subprocess.run([str(python), "-c", script], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
