"""Reports: what they show, what they say was not measured, that strangers' names stay text, that bytes repeat."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from compress.card import model_card
from compress.core.errors import InputError
from compress.export_artifact import export_artifact
from compress.report import compare, comparison, write_report
from compress.report.escape import fenced, markdown, visible
from compress.report.plots import Point, bits_per_layer, error_per_layer, size_quality
from tests.hostile_names import HOSTILE
from tests.sample_run import FALLBACK, sample_run

SVG_TAGS = {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clippath", "rect"}
HOSTILE_KEY = "size-quality"
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\u061c\ufeff\u3164\u115f\uffa0]"
)


class Structure(HTMLParser):
    """Tags with their attribute names outside of pictures; tags inside of pictures; all text; all ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple] = []
        self.in_pictures: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._depth = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self._depth += tag == "svg"
        if self._depth:
            self.in_pictures.add(tag)
        else:
            self.tags.append((tag, *(name for name, _ in attrs)))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "svg"
        if not self._depth:
            self.tags.append(("/", tag))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(paths: tuple[Path, Path, Path]) -> tuple[str, str, dict[str, Any]]:
    page, text, data = (path.read_text(encoding="utf-8") for path in paths)
    return page, text, json.loads(data)


def test_the_page_shows_figures_plots_recipe_fallbacks_plan_environment_and_lineage(tmp_path):
    page, text, data = read(write_report(sample_run(), tmp_path))
    structure = Structure(page)
    for shown in (
        "HuggingFaceTB/SmolLM2-135M", "269 MB", "118 MB", "7.03", "15.62", "15.95", "+2.10 %", "+1.80 % … +2.40 %",
        "0.0291", "8.43 %", "hellaswag: acc (n = 1,000)", "0.4312 ± 0.031", "7 min 24 s", "861 MB",
        "quality gate passed",
        f"down_proj : rounded to nearest: {FALLBACK}", "damping was raised", "group_size: 64", "stride 1,024",
        "apache-2.0", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", "2.13.0", "the head is kept",
    ):  # fmt: skip
        assert shown in structure.text, shown
    assert page.count("<svg") == 3
    assert structure.in_pictures <= SVG_TAGS
    for shown in ("| perplexity | 15.62 | 15.95 | +2.10 % | +1.80 % … +2.40 % |", "Quality gate passed", "```yaml"):
        assert shown in text
    assert data["schema_version"] == 1
    assert data["run"]["evaluation"]["kl"]["mean"] == 0.0291


def test_losses_and_what_each_stage_cost_are_shown(tmp_path):
    run = sample_run()
    worth = {"perplexity": {"artifact": 17.25}, "kl": {"mean": 0.125}, "bits_per_byte": None}
    prune = {"kind": "prune", "method": "channels", "settings": {"ratio": 0.25}, "worth": worth}
    distill = {"kind": "distill", "method": "logits", "losses": [3.0 / step for step in range(1, 1001)]}
    run["stages"] = [prune, distill, *run["stages"]]
    page, text, _ = read(write_report(run, tmp_path))
    structure = Structure(page)
    assert "What each stage cost or won back" in structure.text and "stage 2: logits" in structure.text
    assert "| channels 25 % | 17.25 | 0.125 |" in text
    assert page.count("<svg") == 4
    assert len(page) < 200_000
    assert "loss (nats per token)" in page and "per pair" not in page


def test_a_loss_of_pairs_is_not_called_one_of_tokens(tmp_path):
    run = sample_run()
    figures = {"reward_accuracy": [0.5, 0.75], "reward_margin": [0.0, 1.25]}
    distill = {"kind": "distill", "method": "preference", "losses": [0.6931, 0.3], "figures": figures}
    run["stages"] = [distill, *run["stages"]]
    page, _, _ = read(write_report(run, tmp_path))
    assert "loss (nats per token)" not in page and "loss (per pair)" in page
    assert "beta × nats" in page and "share of a step" in page


def test_the_page_is_one_small_file_that_loads_nothing(tmp_path):
    run = sample_run(blocks=80)
    for block in run["stages"][0]["blocks"]:
        for expert in range(60):
            name = f"model.layers.{block['index']}.mlp.experts.{expert}.gate_proj"
            block["sites"].append({**block["sites"][0], "name": name})
            run["stages"][0]["layers"].append({**run["stages"][0]["layers"][0], "name": name})
            run["fallbacks"].append({"where": name, "reason": "saw 0 tokens"})
    page, _, _ = read(write_report(run, tmp_path))
    assert len(page.encode()) < 3_000_000
    structure = Structure(page)
    assert "experts gate_proj" in structure.text
    assert "more fallbacks, listed in run.json" in structure.text
    linking = [value for name, value in structure.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert all(value and value.startswith("#") for value in linking)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)


def test_ids_are_unique_and_links_within_pictures_lead_somewhere(tmp_path):
    page, _, _ = read(write_report(sample_run(), tmp_path))
    attributes = Structure(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r"url\(#([^)]+)\)", page)) | {v[1:] for n, v in attributes if n == "xlink:href"}
    assert targets
    assert targets <= set(ids)


def test_equal_runs_give_equal_bytes(tmp_path):
    first, second = (write_report(sample_run(), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_was_not_measured_is_said(tmp_path):
    run = sample_run()
    run["evaluation"], run["measured"], run["fallbacks"], run["notices"] = None, {}, [], []
    page, text, _ = read(write_report(run, tmp_path))
    shown = Structure(page).text
    assert "Quality was not measured" in shown
    assert "Quality was not measured" in text
    assert "No layer fell back" in shown
    assert "time of stages and evaluation – not measured" in shown
    assert "0.00" not in " ".join(line for line in text.splitlines() if "KL" in line)

    run["evaluation"] = {
        "protocol": {},
        "perplexity": None,
        "kl": None,
        "flips": None,
        "bits_per_byte": None,
        "tasks": {},
    }
    shown = Structure(read(write_report(run, tmp_path))[0]).text
    assert "Perplexity, KL divergence and flips were not measured" in shown
    assert "No task was measured" in shown

    run["evaluation"] = sample_run()["evaluation"] | {"kl": None, "flips": None, "tasks": {}}
    run["evaluation"]["perplexity"] = {"original": None, "artifact": 15.9, "increase": None, "interval": None}
    run["evaluation"]["bits_per_byte"] = {"original": None, "artifact": 0.9}
    assert "The original was not measured" in Structure(read(write_report(run, tmp_path))[0]).text


def test_what_was_done_to_a_layer_that_fell_back_is_said_everywhere(tmp_path):
    said = f"rounded to nearest: {FALLBACK}"
    page, text, data = read(write_report(sample_run(), tmp_path))
    assert Structure(page).text.count(said) == 2, "in the list and in the row of the layer"
    assert "rounded to nearest: damping" not in Structure(page).text
    assert "rounded to nearest: it saw 12 tokens" in text
    assert [site for site in data["run"]["fallbacks"] if site["reason"] == FALLBACK], "facts stay as they are"


def test_the_bundled_model_is_called_by_what_it_is(tmp_path):
    run = sample_run(blocks=1, model="demo")
    run["source"]["id"] = "model"
    assert "<h1>demo model</h1>" in read(write_report(run, tmp_path))[0]
    assert "# demo model, compressed" in model_card(run)


def test_a_failed_gate_is_said_first(tmp_path):
    run = sample_run()
    run["gate"]["failures"] = ["perplexity rose by 2.1 %, more than the 2 % that the gate allows"]
    page, text, _ = read(write_report(run, tmp_path))
    assert "quality gate failed" in Structure(page).text
    assert text.index("more than the 2 %") < text.index("| figure |")


def test_files_of_the_artifact_are_listed_where_it_still_lies(tmp_path):
    run = sample_run()
    run["artifact"]["path"] = str(tmp_path)
    files = [{"path": "model-00001.safetensors", "size": 1234, "sha256": "9f" * 32}]
    (tmp_path / "compress.json").write_text(json.dumps({"files": files}))
    page, _, _ = read(write_report(run, tmp_path / "report"))
    assert "model-00001.safetensors 1.23 kB " + "9f" * 32 in Structure(page).text


def with_name(name: str) -> dict[str, Any]:
    """A run in which every text that comes from outside is `name`."""
    run = copy.deepcopy(sample_run(blocks=2))
    run["source"]["id"] = run["recipe"]["model"] = run["lineage"]["source"] = name
    run["source"]["revision"] = run["lineage"]["revision"] = run["lineage"]["licence"] = name
    run["lineage"]["sha256"] = {name: name}
    run["stages"][0]["method"] = run["stages"][0]["kind"] = name
    run["stages"][0]["settings"]["scheme"] = name
    run["stages"][0]["blocks"][0]["sites"][0]["fallback"] = name
    run["stages"][0]["layers"][0]["reason"] = run["stages"][0]["layers"][1]["name"] = name
    run["notices"], run["fallbacks"] = [name], [{"where": name, "reason": name}]
    run["environment"] = {"cpu": name}
    run["gate"]["failures"] = [name]
    run["evaluation"]["protocol"]["text"]["text"] = run["evaluation"]["protocol"]["text"]["prefix"] = name
    tasks = run["evaluation"]["protocol"]["tasks"]["tasks"]
    tasks[name] = tasks.pop("hellaswag")
    run["evaluation"]["tasks"] = {name: run["evaluation"]["tasks"]["hellaswag"]}
    return run


def markdown_structure(text: str) -> list[str]:
    """Kinds of all tokens, as GitHub would read the text; raw HTML with its content."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    structure = []
    for token in parser.parse(text):
        structure.append(token.type + (token.content if token.type == "html_block" else ""))
        structure += [child.type for child in token.children or [] if child.type not in ("text", "text_special")]
    return structure


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_forty_hostile_names_are_inert_everywhere(name, tmp_path, monkeypatch):
    assert len(HOSTILE) == 40
    monkeypatch.setattr("compress.report.data._plots", lambda run: [])
    benign, hostile = (read(write_report(with_name(each), tmp_path)) for each in ("harmless", name))
    page = Structure(hostile[0])
    assert page.tags == Structure(benign[0]).tags
    assert not any(attribute.startswith("on") for attribute, _ in page.attributes)
    assert markdown_structure(hostile[1]) == markdown_structure(benign[1])
    cards = [model_card(with_card_facts(each)) for each in ("harmless", name)]
    assert markdown_structure(body(cards[1])) == markdown_structure(body(cards[0]))
    for text in (*hostile[:2], cards[1]):
        assert not UNSEEN.search(text)
    assert not re.search(r"(?<!&#)(https?://|www\.|@everyone)example", outside_code(hostile[1]))
    assert ModelCard(cards[1]).data.library_name == "transformers"


def test_hostile_names_are_inert_in_plots():
    points = [Point(name, 10**6 * (number + 1), 10.0) for number, name in enumerate(HOSTILE)]
    plots = [
        size_quality(points, HOSTILE[0], HOSTILE_KEY),
        error_per_layer([0.1], {name: [0.1] for name in HOSTILE}),
        bits_per_layer(HOSTILE, [[4] for _ in HOSTILE]),
    ]
    benign = bits_per_layer([f"k{number}" for number in range(len(HOSTILE))], [[4] for _ in HOSTILE])
    for plot in plots:
        page = Structure(plot.svg)
        assert page.in_pictures <= SVG_TAGS
        assert not any(attribute.startswith("on") for attribute, _ in page.attributes)
        assert not UNSEEN.search(plot.svg)
        assert "alert(1)" in page.text
    assert {name for name, _ in Structure(plots[2].svg).attributes} == {
        name for name, _ in Structure(benign.svg).attributes
    }


def with_card_facts(name: str) -> dict[str, Any]:
    facts = with_name(name)
    facts["stages"][0]["kind"] = "quantize"
    return facts


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def outside_code(text: str) -> str:
    return re.sub(r"(?ms)^(`{3,}).*?^\1$", "", text)


def test_escaping_keeps_plain_text_plain():
    assert markdown("gptq w4a16, groups of 64 (−0.5 … +0.5 %)") == "gptq w4a16, groups of 64 (−0.5 … +0.5 %)"
    assert markdown("3.11.7 and 1.") == "3.11.7 and 1."
    assert markdown("1. list") != "1. list"
    assert visible("naïve 日本語 ok") == "naïve 日本語 ok"
    assert visible("a\u202eb\x1b") == "a⟨U+202E⟩b⟨U+001B⟩"
    assert fenced("a\n````\nb").startswith("`````\n")


def artifact(folder: Path, name: str, *, bits: int = 4, report: bool = True, change: Any = None) -> Path:
    """A folder as compare() reads it."""
    run = sample_run(bits=bits)
    if change:
        change(run)
    path = folder / name
    path.mkdir(parents=True)
    (path / "compress.json").write_text(json.dumps({"recipe": run["recipe"], "lineage": run["lineage"]}))
    if run["evaluation"] is not None:
        (path / "evaluation.json").write_text(json.dumps(run["evaluation"]))
    save_file({"weights": torch.zeros(1000 * bits, dtype=torch.uint8)}, path / "model.safetensors")
    if report:
        (folder / f"{name}.report").mkdir()
        (folder / f"{name}.report" / "run.json").write_text(json.dumps(run))
    return path


def table(data: Any) -> dict[str, dict[str, str]]:
    return {row[0].value: {c: cell.value for c, cell in zip(data.columns, row, strict=True)} for row in data.rows}


def test_artifacts_of_one_protocol_share_columns_with_their_original(tmp_path):
    paths = [artifact(tmp_path, f"w{bits}", bits=bits) for bits in (3, 4, 8)]
    data = comparison(paths)
    rows = table(data)
    assert data.columns.count("perplexity") == 1
    assert rows["w4"]["perplexity"] == "15.95"
    assert rows["w3"]["perplexity"] == "16.93"
    assert rows["HuggingFaceTB/SmolLM2-135M"]["perplexity"] == "15.62"
    assert rows["w4"]["size"] == "4.00 kB"
    assert rows["w4"]["time"] == "7 min 24 s"
    assert len(data.plots) == 1
    page, text, plain = read(compare(paths, tmp_path / "out"))
    assert "w8" in Structure(page).text
    assert "| w4 | gptq w4a16, groups of 64 |" in text
    assert plain["kind"] == "comparison"


def test_a_gguf_file_counts_in_whole(tmp_path):
    path = artifact(tmp_path, "q4", report=False)
    (path / "model.safetensors").unlink()
    (path / "q4.gguf").write_bytes(bytes(67_257_504))
    rows = table(comparison([path]))
    assert (rows["q4"]["size"], rows["q4"]["bits per weight"]) == ("67.3 MB", "4")
    original = rows["HuggingFaceTB/SmolLM2-135M"]
    assert (original["size"], original["bits per weight"]) == ("269 MB", "16")


def test_figures_of_different_protocols_never_share_a_column(tmp_path):
    def other_text(run):
        run["evaluation"]["protocol"]["text"]["window"] = 512

    def other_task(run):
        run["evaluation"]["protocol"]["tasks"]["tasks"]["hellaswag"]["fewshot"] = 5

    data = comparison(
        [
            artifact(tmp_path, "a"),
            artifact(tmp_path, "b", change=other_text),
            artifact(tmp_path, "c", change=other_task),
        ]
    )
    rows = table(data)
    assert "perplexity" not in data.columns
    assert (rows["a"]["perplexity (text 1)"], rows["a"]["perplexity (text 2)"]) == ("15.95", "–")
    assert (rows["b"]["perplexity (text 1)"], rows["b"]["perplexity (text 2)"]) == ("–", "15.95")
    assert rows["c"]["hellaswag: acc (protocol 1)"] == "–"
    assert rows["c"]["hellaswag: acc (protocol 2)"] != "–"
    assert any("different protocols" in note for note in data.notes)
    assert any("hellaswag was asked in different ways" in note for note in data.notes)
    assert len(data.plots) == 2


def test_an_unmeasured_artifact_and_another_source_are_said(tmp_path):
    def unmeasured(run):
        run["evaluation"] = None

    def other_source(run):
        run["lineage"]["source"] = "other/model"

    data = comparison([artifact(tmp_path, "a", report=False), artifact(tmp_path, "b", report=False, change=unmeasured)])
    assert table(data)["b"]["perplexity"] == "–"
    assert table(data)["a"]["peak memory"] == "not measured"
    assert any("Not measured: the quality of b" in note for note in data.notes)
    data = comparison([artifact(tmp_path, "c"), artifact(tmp_path, "d", change=other_source)])
    assert any("different models" in note for note in data.notes)
    assert len(data.rows) == 2


def test_each_original_is_drawn_once_whatever_else_is_compared(tmp_path):
    """An artifact of another model is measured on a text of its own; no report beside an artifact is needed."""

    def other(run):
        run["lineage"]["source"], run["lineage"]["bytes"] = "other/model", 50_000_000
        run["evaluation"]["perplexity"]["original"] = 20.0

    data = comparison(
        [
            artifact(tmp_path, "a", report=False),
            artifact(tmp_path, "b", bits=3),
            artifact(tmp_path, "c", report=False, change=other),
        ]
    )
    assert [Structure(plot.svg).texts.count("original") for plot in data.plots] == [1, 1]


def svg_labels(svg: str, names: set[str]) -> dict[str, tuple[float, float]]:
    """Where a plot's texts among `names` begin, in points."""
    found = re.findall(r'<text [^>]*?\bx="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>', svg)
    found += re.findall(r"<text [^>]*?translate\(([\d.]+) ([\d.]+)\)[^>]*>([^<]+)</text>", svg)
    return {text: (float(x), float(y)) for x, y, text in found if text in names}


def test_labels_of_artifacts_at_one_point_do_not_cover_each_other():
    names = {"first", "second", "third", "fourth", "original"}
    points = [
        Point("first", 4_600_000, 18.4254, (18.39, 18.46)),
        Point("second", 4_600_000, 18.4254, (18.39, 18.46)),
        Point("third", 4_610_000, 18.4254, (18.39, 18.46)),
        Point("fourth", 4_600_000, 18.4256),
        Point("original", 13_600_000, 18.26, is_original=True),
    ]
    svg = size_quality(points, "perplexity").svg
    places = svg_labels(svg, names)
    assert places.keys() == names
    heights = sorted(y for name, (_, y) in places.items() if name != "original")
    assert min(high - low for low, high in zip(heights[:-1], heights[1:], strict=True)) > 9, places


def test_equal_names_are_told_apart_and_strangers_are_refused(tmp_path):
    data = comparison([artifact(tmp_path / "x", "same"), artifact(tmp_path / "y", "same", bits=3)])
    assert [row[0].value for row in data.rows[1:]] == ["same", "same (2)"]
    (tmp_path / "stranger").mkdir()
    with pytest.raises(InputError, match="no artifact of ours"):
        comparison([tmp_path / "stranger"])
    (tmp_path / "stranger" / "compress.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        comparison([tmp_path / "stranger"])


def test_the_card_names_base_model_licence_figures_protocol_and_loaders():
    card = model_card(sample_run())
    data = ModelCard(card).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert data.license == "apache-2.0"
    assert set(data.tags) == {"compress", "compressed-tensors", "gptq"}
    for shown in (
        "| perplexity | 15.62 | 15.95 | +2.10 % |", "stride: 1,024", "by loader rules of version", "not run here",
        "group_size: 64", "proj: rounded to nearest: it saw 12 tokens", "from_pretrained",
    ):  # fmt: skip
        assert shown in card, shown
    assert "dequantize=True)" not in card
    assert card == model_card(sample_run())


def test_the_card_of_an_asymmetric_artifact_says_how_it_loads_and_holds_no_time_or_memory():
    run = sample_run()
    for layer in run["stages"][0]["layers"]:
        layer["symmetric"] = False
    card = model_card(run)
    assert "CompressedTensorsConfig(dequantize=True)" in card
    assert "7 min" not in card
    assert "861 MB" not in card


def test_the_card_of_a_local_unmeasured_model_says_so():
    run = sample_run(model="my-model")
    run["lineage"]["licence"], run["evaluation"] = None, None
    card = model_card(run)
    assert ModelCard(card).data.base_model is None
    assert "Quality was not measured." in card
    assert "not stated by the source" in card


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_a_gguf_folder_without_stages_is_called_by_its_type(tmp_path, tiny_model, type: str):
    export_artifact(tiny_model("llama"), tmp_path / "exported", "gguf", type=type)
    rows = table(comparison([artifact(tmp_path, "w4"), tmp_path / "exported"]))
    assert f"gguf {type}" in rows["exported"].values()
    assert "no stage" not in rows["exported"].values()
