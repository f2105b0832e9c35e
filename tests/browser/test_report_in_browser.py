"""The report as a browser sees it: tables and plots are laid out with a size, nothing is fetched, nothing overflows."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.report import compare, write_report
from compress.report.speed import write_speed_report
from tests.hostile_names import HOSTILE
from tests.sample_benchmark import sample_benchmark
from tests.sample_run import sample_run

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
MEASURE = """
const seen = [...document.querySelectorAll("table, svg, h1, .tile, pre")].map(node => {
  const box = node.getBoundingClientRect();
  return {tag: node.tagName.toLowerCase(), width: box.width, height: box.height, key: node.closest("[id]")?.id ?? ""};
});
const page = {width: document.documentElement.scrollWidth, window: window.innerWidth};
const said = {seen, page, rows: document.querySelectorAll("#figures tbody tr").length, title: document.title,
              resources: performance.getEntriesByType("resource").map(entry => entry.name), hacked: window.hacked ?? 0};
document.body.textContent = JSON.stringify(said);
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("needs Chromium (Debian package chromium)")
    return found


def look(chromium: str, page: Path, profile: Path, width: int) -> dict:
    """What the page says about itself when a script is added to a copy of it (its own policy allows none)."""
    text = page.read_text(encoding="utf-8")
    copy = page.with_name("measured.html")
    copy.write_text(re.sub(r"<meta http-equiv.*?>", "", text).replace("</html>", f"<script>{MEASURE}</script></html>"))
    command = [
        chromium,
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--window-size={width},1400",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))


@pytest.mark.parametrize("width", [1200, 500])
def test_tables_and_plots_are_there_at_desktop_and_phone_width(chromium, tmp_path, width):
    page, _, _ = write_report(sample_run(), tmp_path / "report")
    said = look(chromium, page, tmp_path / "profile", width)
    pictures = {item["key"]: item for item in said["seen"] if item["tag"] == "svg"}
    tables = [item for item in said["seen"] if item["tag"] == "table" and item["key"] in ("figures", "plan", "stages")]
    assert len(pictures) == 3
    assert len(tables) == 3
    assert all(250 < item["width"] < width and item["height"] > 60 for item in pictures.values()), pictures
    assert all(item["width"] > 250 and item["height"] > 40 for item in tables), tables
    assert said["rows"] == 11
    assert said["page"]["width"] <= said["page"]["window"]
    assert said["resources"] == []


def test_a_comparison_is_laid_out_and_hostile_names_run_nothing(chromium, tmp_path):
    run = sample_run(blocks=2)
    run["notices"] = [name.replace("alert(1)", "window.hacked=1") for name in HOSTILE]
    run["source"]["id"] = "</title><script>window.hacked=1</script>"
    said = look(chromium, write_report(run, tmp_path / "report")[0], tmp_path / "profile", 1200)
    assert said["hacked"] == 0
    assert "<script>" in said["title"]
    paths = []
    for bits in (3, 4):
        folder = tmp_path / f"w{bits}"
        folder.mkdir()
        run = sample_run(bits=bits)
        (folder / "compress.json").write_text(json.dumps({"recipe": run["recipe"], "lineage": run["lineage"]}))
        (folder / "evaluation.json").write_text(json.dumps(run["evaluation"]))
        save_file({"weights": torch.zeros(1000 * bits, dtype=torch.uint8)}, folder / "model.safetensors")
        paths.append(folder)
    said = look(chromium, compare(paths, tmp_path / "out")[0], tmp_path / "profile", 1200)
    assert said["rows"] == 3
    assert any(item["tag"] == "svg" and item["height"] > 60 for item in said["seen"])
    assert said["page"]["width"] <= said["page"]["window"]


@pytest.mark.parametrize("tasks", [0, 1, 4])
@pytest.mark.parametrize("width", [1400, 1100, 800])
def test_no_column_of_a_comparison_is_cut_off(chromium, tmp_path, width, tasks):
    """Few columns grow narrow, many become cards."""
    paths = []
    for bits in (3, 4):
        folder = tmp_path / f"SmolLM2-135M-gptq-w{bits}a16-g64"
        folder.mkdir()
        run = sample_run(bits=bits)
        measured, asked = run["evaluation"]["tasks"], run["evaluation"]["protocol"]["tasks"]["tasks"]
        for task in range(tasks):
            measured[f"task_{task}"], asked[f"task_{task}"] = measured["hellaswag"], asked["hellaswag"]
        (folder / "compress.json").write_text(json.dumps({"recipe": run["recipe"], "lineage": run["lineage"]}))
        (folder / "evaluation.json").write_text(json.dumps(run["evaluation"]))
        save_file({"weights": torch.zeros(1000 * bits, dtype=torch.uint8)}, folder / "model.safetensors")
        paths.append(folder)
    said = look(chromium, compare(paths, tmp_path / "out")[0], tmp_path / "profile", width)
    [table] = [item for item in said["seen"] if item["tag"] == "table"]
    card_and_page_edges = 40
    assert 0 < table["width"] <= width - card_and_page_edges


@pytest.mark.parametrize("width", [1200, 500])
def test_a_benchmark_s_page_is_laid_out_at_desktop_and_phone_width(chromium, tmp_path, width):
    page, _, _ = write_speed_report(sample_benchmark(), tmp_path / "report")
    said = look(chromium, page, tmp_path / "profile", width)
    pictures = {item["key"]: item for item in said["seen"] if item["tag"] == "svg"}
    assert pictures.keys() == {"first_token", "per_token", "gap", "tokens", "requests"}
    assert all(250 < item["width"] < width and item["height"] > 100 for item in pictures.values()), pictures
    assert sum(item["tag"] == "table" and item["height"] > 60 for item in said["seen"]) == 4
    assert said["page"]["width"] <= said["page"]["window"]
    assert said["resources"] == []
