"""Render: report data into files, through templates. Every file is written at once and durably."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from compress.core.files import atomic_write, report_folder
from compress.report.data import SCHEMA_VERSION, ReportData, report_data
from compress.report.escape import fenced, html_finalize, markdown_finalize

TEMPLATES = Path(__file__).parent.parent / "templates"


def write_report(run: Mapping[str, Any], folder: Path | str) -> tuple[Path, Path, Path]:
    """Write report.html, report.md and report.json of a run into `folder`; returns their paths."""
    data = report_data(run)
    raw = {key: run.get(key) for key in ("source", "artifact", "evaluation", "plan", "measured", "gate", "fallbacks")}
    return write_files(
        folder,
        "report",
        html=html("report.html.j2", report=data),
        text=markdown_text("report.md.j2", report=data),
        data={"schema_version": SCHEMA_VERSION, "kind": "run", **_plain(data), "run": raw},
    )


def write_files(folder: Path | str, name: str, *, html: str, text: str, data: Any) -> tuple[Path, Path, Path]:
    """NAME.html, NAME.md and NAME.json."""
    folder = report_folder(Path(folder))
    content = {"html": html, "md": text, "json": json.dumps(data, indent=1, sort_keys=True) + "\n"}
    for ending, value in content.items():
        atomic_write(folder / f"{name}.{ending}", value)
    return folder / f"{name}.html", folder / f"{name}.md", folder / f"{name}.json"


def html(template: str, **values: Any) -> str:
    """A page from an HTML template: everything escaped, unknown names an error."""
    return _environment(finalize=html_finalize, autoescape=True).get_template(template).render(values)


def markdown_text(template: str, **values: Any) -> str:
    """Text from a Markdown template: everything escaped but what is marked Verbatim."""
    environment = _environment(finalize=markdown_finalize, autoescape=False)
    environment.filters["fenced"] = fenced
    return environment.get_template(template).render(values)


def _environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _plain(data: ReportData) -> dict[str, Any]:
    """The texts of a report without its pictures."""
    return {key: value for key, value in asdict(data).items() if key != "plots"}
