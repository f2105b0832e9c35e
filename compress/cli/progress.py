"""Live progress: one bar per stage with blocks, time left and memory, or one line per stage where nobody watches.

Time left comes from the median of the last measured units, so that blocks replayed after a resume do not flatter it.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from types import TracebackType

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from compress.cli.console import Output, clean
from compress.cli.words import duration
from compress.core.events import Event, Finished, Metric, Notice, Started
from compress.core.events import Progress as Done
from compress.core.quantities import format_bytes

_STATUS = Path("/proc/self/status")


def memory_bytes() -> int | None:
    """Anonymous memory that this process holds now; None where the system does not say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


_TITLES = {"walk": "compress"}
"""Stages whose name in the code says little to people."""


class _Memory(ProgressColumn):
    """What the process holds now; for a stage that is over, what it held at its end."""

    def render(self, task: Task) -> Text:
        held = task.fields["held"] if task.finished else memory_bytes()
        return Text(format_bytes(held) if held is not None else "", style="dim")


class LiveProgress:
    """The listener of a run at the command line: `with LiveProgress(output) as listener: run(…, listener)`."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._live = output.people.is_terminal and not output.json and not output.quiet
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[time]}", markup=False),
            _Memory(),
            console=output.people,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._pace: dict[str, _Pace] = {}
        self._losses: dict[str, list[float]] = {}
        self._totals: dict[str, int] = {}

    def __enter__(self) -> "LiveProgress":
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        if self._output.json:
            self._emit(event)
        elif self._output.quiet:
            return
        elif isinstance(event, Notice):
            text = f"{event.where}: {event.message}" if event.where else event.message
            self._line(f"warning: {text}" if event.level == "warning" else text, event.level == "warning")
        elif isinstance(event, Metric):
            if event.name == "loss":
                self._losses.setdefault(event.stage, []).append(event.value)
            if self._output.verbose:
                self._line(f"{event.where or event.stage}: {event.name} {event.value:.4g}")
        elif event.stage == "run":
            return  # the command itself says what it runs and what came of it
        elif self._live:
            self._move_bar(event)
        else:
            self._say(event)

    def _emit(self, event: Event) -> None:
        extra = {"memory_bytes": memory_bytes()} if isinstance(event, Done) else {}
        self._output.emit(type(event).__name__.lower(), **asdict(event), **extra)

    def _line(self, text: str, warning: bool = False) -> None:
        style = "yellow" if warning else "dim"
        self._output.people.print(Text(clean(text), style=style), soft_wrap=not self._live)

    def _say(self, event: Started | Done | Finished) -> None:
        """One line when a stage begins and one when it is over, for logs."""
        name = _TITLES.get(event.stage, event.stage)
        if isinstance(event, Started):
            self._totals[event.stage] = event.total
            self._line(f"{name}: {event.total} {event.unit}s" if event.total > 1 else name)
        elif isinstance(event, Done) and self._losses.get(event.stage):
            tenths = (10 * done // self._totals[event.stage] for done in (event.done - 1, event.done))
            if len(set(tenths)) > 1:
                curve = sparkline(self._losses[event.stage])
                self._line(f"{name}: step {event.done} of {self._totals[event.stage]}, loss {curve}")
        elif isinstance(event, Finished):
            self._line(f"{name}: done{f', {event.summary}' if event.summary else ''}")

    def _move_bar(self, event: Started | Done | Finished) -> None:
        if isinstance(event, Started):
            self._pace[event.stage] = _Pace(event.unit)
            title = clean(_TITLES.get(event.stage, event.stage))
            self._tasks[event.stage] = self._bars.add_task(title, total=event.total, count="", time="", held=None)
        elif event.stage in self._tasks:
            done = event.done if isinstance(event, Done) else None
            self._update(event.stage, done)

    def _update(self, stage: str, done: int | None) -> None:
        """Advance a stage to `done` units; None: to its end."""
        task, pace = self._tasks[stage], self._pace[stage]
        total = int(next(bar.total or 0 for bar in self._bars.tasks if bar.id == task))
        done = total if done is None else done
        pace.note(done)
        time_text = pace.left(total - done) if done < total else pace.took()
        count = f"{done}/{total} {pace.unit}s" if total > 1 else ""
        if self._losses.get(stage):
            count += f", loss {sparkline(self._losses[stage])}"
        self._bars.update(task, completed=done, count=count, time=time_text, held=memory_bytes())


_TICKS = "▁▂▃▄▅▆▇█"
_SPARKS = 12


def sparkline(values: Sequence[float]) -> str:
    """A curve of a few letters, and its last value: "█▅▃▂▁ 2.31". Each letter is the mean of a part."""
    parts = min(_SPARKS, len(values))
    edges = [len(values) * place // parts for place in range(parts + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    steps = [round((mean - low) / (high - low) * (len(_TICKS) - 1)) if high > low else 0 for mean in means]
    return f"{''.join(_TICKS[step] for step in steps)} {means[-1]:.4g}"


class _Pace:
    """How long units take."""

    def __init__(self, unit: str = "block") -> None:
        self.unit = unit
        self._started = self._since = time.monotonic()
        self._done = 0
        self._seconds: deque[float] = deque(maxlen=8)

    def note(self, done: int) -> None:
        """`done` units are finished by now."""
        now = time.monotonic()
        if done > self._done:
            self._seconds.append((now - self._since) / (done - self._done))
            self._since, self._done = now, done

    def left(self, units: int) -> str:
        """Time that `units` more will take; empty before the first is measured."""
        if units <= 0 or not self._seconds:
            return ""
        return f"{duration(median(self._seconds) * units)} left"

    def took(self) -> str:
        """Time from the start to the last unit."""
        return f"took {duration(self._since - self._started)}"
