"""Progress: bars with blocks, time left and memory for people, objects for programs, nothing for --quiet."""

import io
import json
import re

import pytest
from rich.console import Console

from compress.cli import progress
from compress.cli.console import Output
from compress.cli.progress import LiveProgress
from compress.cli.tables import before_after, cost_line
from compress.cli.words import change, duration, figure, percent
from compress.core.events import Event, Finished, Metric, Notice, Progress, Started
from tests.sample_run import sample_run

EVENTS: list[Event] = [
    Started("walk", 4),
    Metric("walk", "output_error", 0.00123, "model.layers.0"),
    Progress("walk", 1, 4, "model.layers.0"),
    Notice("saw 12 tokens: rounded to nearest", "model.layers.0.mlp.down_proj", "warning"),
    Progress("walk", 2, 4, "model.layers.1"),
    Progress("walk", 4, 4, "model.layers.3"),
    Finished("walk", "4 blocks"),
    Started("evaluate text", 1, "window"),
    Progress("evaluate text", 1, 1),
    Finished("evaluate text"),
]


def listen(*, terminal: bool, events: list[Event] = EVENTS, **mode: bool) -> str:
    people = Console(file=io.StringIO(), force_terminal=terminal, width=80, markup=False, highlight=False)
    with LiveProgress(Output(people=people, **mode)) as listener:
        for event in events:
            listener(event)
    return people.file.getvalue()


def test_without_a_terminal_there_is_a_line_per_stage() -> None:
    lines = [line.rstrip() for line in listen(terminal=False).splitlines()]
    assert lines == [
        "compress: 4 blocks",
        "warning: model.layers.0.mlp.down_proj: saw 12 tokens: rounded to nearest",
        "compress: done, 4 blocks",
        "evaluate text",
        "evaluate text: done",
    ]


def test_verbose_shows_metrics_and_quiet_nothing() -> None:
    assert "model.layers.0: output_error 0.00123" in listen(terminal=False, verbose=True)
    assert listen(terminal=False, quiet=True) == ""
    assert listen(terminal=True, quiet=True) == ""


def test_a_terminal_sees_bars_with_blocks_and_memory_in_80_columns() -> None:
    text = listen(terminal=True)
    assert "4/4 blocks" in text
    assert " MB" in text
    shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for line in text.splitlines() for part in line.split("\r")]
    assert max(map(len, shown)) <= 80
    assert "took" in text


def test_json_gives_every_event_with_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert listen(terminal=False, json=True) == ""
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["event"] for item in objects] == [type(event).__name__.lower() for event in EVENTS]
    assert objects[0] == {"event": "started", "stage": "walk", "total": 4, "unit": "block"}
    assert objects[2]["memory_bytes"] > 1_000_000


def test_time_left_is_the_median_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    pace = progress._Pace()
    assert pace.left(5) == ""
    for seconds in (0.01, 10, 10, 30, 10):  # a replayed block, three usual ones, a hiccup
        now += seconds
        pace.note(pace._done + 1)
    assert pace.left(6) == "1 min 0 s left"
    assert pace.left(0) == ""


def test_hostile_notices_are_inert_in_bars() -> None:
    text = listen(terminal=True, events=[Started("\x1b[31mx[bold]", 1), Notice("\x1b]0;title\x07 [red]r[/red]")])
    assert "\x1b]0;" not in text and "\x1b[31mx" not in text
    assert "[bold]" in text and "[red]r[/red]" in text


def test_the_final_table_fits_80_columns_and_hides_nothing() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(before_after(sample_run()))
    text = console.file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for words in ("269 MB", "118 MB", "16.00", "7.03", "15.62", "+2.10 %", "nats", "hellaswag (acc_norm)", "pt ["):
        assert words in text
    assert (
        cost_line(sample_run())
        == "stages and evaluation took 7 min 24 s · peak memory 861 MB · 2 fallbacks, see the report"
    )


def test_what_was_not_measured_has_no_row() -> None:
    run = {**sample_run(), "evaluation": None}
    console = Console(file=io.StringIO(), width=80)
    console.print(before_after(run))
    assert "perplexity" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (duration(0.04), "0.0 s"),
        (duration(9.96), "10 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(95), "1 min 35 s"),
        (duration(7290), "2 h 1 min"),
        (figure(12.3456), "12.35"),
        (figure(0.029), "0.02900"),
        (figure(123456.7), "123457"),
        (figure(1.5e9), "1.5e+09"),
        (figure(0), "0"),
        (figure(None), "–"),
        (percent(0.513), "51.3 %"),
        (change(0.017, [0.012, 0.022]), "+1.70 % [+1.20, +2.20]"),
        (change(-0.01, None, "points"), "-1.00 points"),
        (change(None), ""),
    ],
)
def test_figures_in_words(got: str, wanted: str) -> None:
    assert got == wanted


def test_losses_are_drawn_as_they_come() -> None:
    losses = [4.0, 3.0, 2.0, 1.0]
    events: list[Event] = [Started("train", 20, "step")]
    for step in range(20):
        events += [Metric("train", "loss", losses[step // 5]), Progress("train", step + 1, 20)]
    lines = [line.rstrip() for line in listen(terminal=False, events=events).splitlines()]
    assert len(lines) == 1 + 10  # a line for each tenth
    assert lines[1] == "train: step 2 of 20, loss ▁▁ 4"
    assert lines[-1] == "train: step 20 of 20, loss " + progress.sparkline([loss for loss in losses for _ in range(5)])
    assert "loss" in listen(terminal=True, events=events)


def test_a_curve_of_letters() -> None:
    assert progress.sparkline([1.0]) == "▁ 1"
    assert progress.sparkline([0.0, 7.0, 3.5]) == "▁█▅ 3.5"
    assert progress.sparkline([*[2.0] * 50, *[1.0] * 50]) == "██████▁▁▁▁▁▁ 1"
