"""A run as a whole, on a tiny model: what it writes, what it refuses, how it goes on, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import planning
from compress.core import verify
from compress.core.artifact import open_artifact
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError, LockError, RecipeError, ResourceError, UsageError
from compress.core.events import Event, Finished, Notice, Progress, Started
from compress.core.files import sha256_file
from compress.core.lock import FolderLock
from compress.core.manifest import Manifest
from compress.core.recipe import Evaluation, Gate, Perplexity, Recipe, Stage, load_recipe, parse_recipe
from compress.core.recipe_text import recipe_yaml
from compress.evaluate import evaluate_folder
from compress.pipeline import RunOptions, plan, run
from compress.workspace import Workspace
from tests.conftest import TinyModel
from tests.fake_passes import Shrink

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "
BLOCKS = 3


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A folder with a model and a text, in which recipes use relative names."""
    shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(STORY * 4)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    (tmp_path / "model" / ".hidden").write_text("private")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return tmp_path


def rtn(place: Path, **more: Any) -> Recipe:
    settings = {"method": "rtn", "group_size": 16}
    return parse_recipe({"model": "model", "stages": [{"quantize": settings}], **more}, base_folder=place)


def gptq(place: Path, **settings: Any) -> Recipe:
    stage = {"quantize": {"method": "gptq", "group_size": 16, **settings}}
    calibration = {"dataset": "text.txt", "samples": 4, "length": 16}
    return parse_recipe({"model": "model", "calibration": calibration, "stages": [stage]}, base_folder=place)


def test_a_stage_looks_at_the_first_rows_of_the_text_if_asked(place: Path) -> None:
    def weights(name: str, rows: int, **settings: int) -> list[str]:
        asked = [f"calibration.samples={rows}", *(f"stages[0].quantize.{key}={n}" for key, n in settings.items())]
        text = recipe_yaml(gptq(place))
        (place / "recipe.yaml").write_text(text)
        artifact = run(load_recipe(place / "recipe.yaml", asked), RunOptions(place / name)).artifact
        return [sha256_file(path) for path in sorted(artifact.glob("*.safetensors"))]

    all_rows, some = weights("all", 4), weights("some", 4, samples=2)
    assert some == weights("fewer", 2)
    assert some != all_rows
    assert all_rows == weights("more", 4, samples=9)


def test_a_stage_that_looks_at_no_text_has_no_rows_of_it(place: Path) -> None:
    settings = {"method": "rtn", "group_size": 16, "samples": 2}
    with pytest.raises(RecipeError, match="rtn looks at no calibration text"):
        parse_recipe({"model": "model", "stages": [{"quantize": settings}]}, base_folder=place)


def shrink(place: Path, **settings: Any) -> Recipe:
    recipe = rtn(place)
    return recipe.model_copy(update={"stages": (Stage(kind="prune", method="shrink", settings=Shrink(**settings)),)})


def go(recipe: Recipe, place: Path, **options: Any) -> Any:
    return run(recipe, RunOptions(place / "out", **options))


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


class Stopped(Exception):
    pass


def stop_after(block: int) -> Callable[[Event], None]:
    """A listener that breaks the run off when `block` blocks are durable."""

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and event.done == block:
            raise Stopped

    return listen


def break_off(recipe: Recipe, place: Path, block: int = 2, **options: Any) -> None:
    with pytest.raises(Stopped):
        run(recipe, RunOptions(place / "out", **options), stop_after(block))


# ---------------------------------------------------------------------- what is written


def test_the_artifact_is_whole_and_its_manifest_true(place: Path) -> None:
    result = go(rtn(place), place)
    artifact = open_artifact(result.artifact)
    found = contents(result.artifact)
    assert {file.path: file.sha256 for file in artifact.manifest.files} == {
        name: digest for name, digest in found.items() if name != "compress.json"
    }
    assert all((result.artifact / file.path).stat().st_size == file.size for file in artifact.manifest.files)
    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name in carried:
        assert (result.artifact / name).read_bytes() == (place / "model" / name).read_bytes()
    shards = {f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    written = {"config.json", "model.safetensors.index.json", "compress.json", "recipe.yaml", "README.md"}
    assert found.keys() == carried | shards | written
    assert artifact.manifest.lineage["licence"] == "apache-2.0"
    assert sorted(path.name for path in place.iterdir()) == ["model", "out", "out.report", "text.txt"]
    assert all(path.stat().st_nlink == 1 for path in result.artifact.iterdir())


def test_coverage_names_every_tensor_of_the_source(place: Path) -> None:
    result = go(rtn(place), place)
    source = Checkpoint.open(place / "model")
    fates = {item.tensor: item.status for item in open_artifact(result.artifact).manifest.coverage}
    assert fates.keys() == source.tensors.keys()
    sites = {f"{site}.weight" for index in range(BLOCKS) for site in source.sites(index)}
    assert {name for name, status in fates.items() if status == "quantized"} == sites
    assert "dropped" not in fates.values()


def test_the_plan_gives_exact_bytes(place: Path) -> None:
    recipe = rtn(place)
    planned = plan(recipe, RunOptions(place / "out"))
    assert not (place / "out.partial").exists()
    result = go(recipe, place)
    tensors = Checkpoint.open(result.artifact).tensors.values()
    assert planned.bytes_out == sum(info.bytes for info in tensors)
    assert result.summary["measured"]["bytes"] == planned.bytes_out
    weights = [path for path in result.artifact.iterdir() if path.suffix == ".safetensors"]
    headers = sum(path.stat().st_size for path in weights) - planned.bytes_out
    assert 0 < headers < 16_000


def test_run_json_says_what_was_done_and_measured(place: Path) -> None:
    result = go(gptq(place), place)
    written = json.loads((place / "out.report" / "run.json").read_text())
    assert written == json.loads(json.dumps(result.summary))
    stage = written["stages"][0]
    assert [block["index"] for block in stage["blocks"]] == [0, 1, 2]
    assert all(block["output_error"] > 0 for block in stage["blocks"])
    assert {layer["bits"] for layer in stage["layers"]} == {4}
    assert written["measured"]["peak_memory_bytes"] > 1 << 20
    assert written["measured"]["minutes"] > 0
    assert {path.name for path in (place / "out.report").iterdir()} >= {"run.json", "report.html", "report.md"}


def test_a_dense_result_is_rounded_once_to_the_sources_dtype(place: Path) -> None:
    result = go(shrink(place, factor=0.3), place)
    before, after = Checkpoint.open(place / "model"), Checkpoint.open(result.artifact)
    assert {name: info.dtype for name, info in after.tensors.items()} == {
        name: info.dtype for name, info in before.tensors.items()
    }
    site = before.sites(1)[0]
    expected = (before.weight(site, torch.float32) * 0.3).to(torch.bfloat16)
    assert torch.equal(after.tensor(f"{site}.weight"), expected)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(after.tensor(embedding), before.tensor(embedding))
    assert "quantization_config" not in after.config


def test_stages_follow_each_other_in_fp32_and_leave_no_folder(place: Path) -> None:
    both = shrink(place, factor=0.3).model_copy(
        update={"stages": (*shrink(place, factor=0.3).stages, *rtn(place).stages)}
    )
    result = go(both, place, keep_stages=True)
    kept = Checkpoint.open(place / "out.stages" / "00-prune")
    site = kept.sites(0)[0]
    assert kept.tensor(f"{site}.weight").dtype == torch.float32
    artifact = Checkpoint.open(result.artifact)
    norm = next(name for name in artifact.tensors if "norm" in name)
    assert artifact.tensor(norm).dtype == torch.bfloat16
    again = run(both, RunOptions(place / "other"))
    assert contents(again.artifact) == contents(result.artifact)
    assert not (place / "other.stages").exists() and not (place / "other.partial").exists()


def test_equal_runs_give_equal_bytes_and_no_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go(gptq(place), place)
    monkeypatch.chdir(place / "model")
    second = run(gptq(place), RunOptions(Path("..") / "elsewhere"))
    assert contents(first.artifact) == contents(second.artifact)
    for path in first.artifact.iterdir():
        assert str(place).encode() not in path.read_bytes()


def test_the_callers_random_state_is_left_alone(place: Path) -> None:
    before = torch.random.get_rng_state()
    go(gptq(place), place)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_missed_gate_is_reported_after_all_is_written(place: Path) -> None:
    evaluation = Evaluation(perplexity=Perplexity(dataset="text.txt", window=32))
    recipe = rtn(place).model_copy(update={"evaluate": evaluation, "gate": Gate(max_kl=0.0, max_size=10)})
    result = go(recipe, place)
    assert len(result.gate_failures) == 2
    assert result.summary["gate"]["failures"] == result.gate_failures
    evaluated = json.loads((result.artifact / "evaluation.json").read_text())
    assert evaluated == result.summary["evaluation"]
    assert evaluated["kl"]["mean"] > 0
    skipped = run(recipe, RunOptions(place / "unmeasured", evaluate=False))
    assert not (skipped.artifact / "evaluation.json").exists()


# ---------------------------------------------------------------------- going on


def test_broken_off_and_started_again_it_ends_with_the_same_bytes(place: Path) -> None:
    recipe = gptq(place)
    straight = run(recipe, RunOptions(place / "straight"))
    break_off(recipe, place)
    stage = place / "out.partial" / "stages" / "00-quantize"
    before = {path.name: path.stat().st_mtime_ns for path in stage.glob("*.safetensors")}
    assert len(before) == 2
    seen: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.done == BLOCKS and event.stage == "walk":
            seen.extend(
                path.stat().st_mtime_ns == before.get(path.name) for path in sorted(stage.glob("*.safetensors"))
            )

    result = run(recipe, RunOptions(place / "out"), listen)
    assert seen[:2] == [True, True]  # finished shards were not written again
    assert contents(result.artifact) == contents(straight.artifact)
    assert not (place / "out.partial").exists()


def changed_recipe(place: Path, _: pytest.MonkeyPatch) -> Recipe:
    return gptq(place, damping=0.05)


def changed_model(place: Path, _: pytest.MonkeyPatch) -> Recipe:
    path = place / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return gptq(place)


def changed_data(place: Path, _: pytest.MonkeyPatch) -> Recipe:
    (place / "text.txt").write_text(STORY.upper() * 4)
    return gptq(place)


def changed_version(place: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(compress, "__version__", "99.0")
    return gptq(place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_recipe, r"recipe.stages\[0\].quantize.damping: 0.01 → 0.05"),
        (changed_model, "source.sha256.model.safetensors: "),
        (changed_data, "tokens: "),
        (changed_version, r"versions.compress: \S+ → 99.0"),
    ],
)
def test_changed_inputs_are_refused_and_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, pytest.MonkeyPatch], Recipe], words: str
) -> None:
    break_off(gptq(place), place)
    before = contents(place / "out.partial")
    recipe = change(place, monkeypatch)
    with pytest.raises(UsageError, match=words) as caught:
        go(recipe, place)
    assert "--fresh" in str(caught.value) and ";" not in caught.value.message.split("resumed: ")[1]
    assert contents(place / "out.partial").keys() == before.keys()
    assert go(recipe, place, fresh=True).artifact.exists()


def test_other_threads_or_micro_batch_are_refused(place: Path) -> None:
    break_off(gptq(place), place)
    with pytest.raises(UsageError, match="micro_batch: .* → 1"):
        go(gptq(place), place, micro_batch=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UsageError, match=f"threads: {threads} → {threads + 1}"):
            go(gptq(place), place)
    finally:
        torch.set_num_threads(threads)


def test_fresh_throws_the_unfinished_run_away(place: Path) -> None:
    break_off(gptq(place), place)
    started: list[str] = []
    run(gptq(place), RunOptions(place / "out", fresh=True), lambda event: started.append(repr(event)))
    assert sum("output_error" in event for event in started) == BLOCKS


def test_one_interrupt_finishes_the_block(place: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Started) and event.stage == "walk":
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(gptq(place), RunOptions(place / "out"), interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    shards = list((place / "out.partial" / "stages" / "00-quantize").glob("*.safetensors"))
    assert [path.name for path in shards] == ["model-00001-of-00004.safetensors"]
    straight = run(gptq(place), RunOptions(place / "straight"))
    assert contents(go(gptq(place), place).artifact) == contents(straight.artifact)


def test_a_second_interrupt_stops_at_once(place: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Started) and event.stage == "walk":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(gptq(place), RunOptions(place / "out"), interrupt)
    assert not list((place / "out.partial").rglob("*.safetensors"))


def test_a_missing_shard_of_a_finished_block_is_noticed(place: Path) -> None:
    break_off(rtn(place), place)
    next((place / "out.partial").rglob("model-00001*")).unlink()
    with pytest.raises(ArtifactError, match="finished block 0 is not as the journal says"):
        go(rtn(place), place)


# ---------------------------------------------------------------------- refusals


def test_an_existing_output_is_refused_untouched_and_replaced_with_fresh(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("precious")
    for call in (plan, run):
        with pytest.raises(UsageError, match="output exists"):
            call(rtn(place), RunOptions(place / "out"))
    assert contents(place / "out").keys() == {"mine"}
    assert not (place / "out.partial").exists()
    put_old_artifact(place / "out")
    result = go(rtn(place), place, fresh=True)
    assert not (result.artifact / "mine").exists()


def put_old_artifact(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    old = Manifest(version="0", files=(), recipe={}, fingerprint={}, lineage={}, coverage=())
    (folder / "compress.json").write_text(old.text())


def test_a_replacement_spares_the_old_output_until_the_end_and_resumes_without_fresh(place: Path) -> None:
    put_old_artifact(place / "out")
    before = contents(place / "out")
    break_off(rtn(place), place, fresh=True)
    assert contents(place / "out") == before
    result = go(rtn(place), place)
    assert contents(result.artifact) != before
    assert sorted(path.name for path in place.iterdir()) == ["model", "out", "out.report", "text.txt"]


def refused(recipe: Recipe, place: Path, output: Path | str, words: str, **options: Any) -> None:
    """Refused as a usage error with and without --fresh, as a plan and as a run, and nothing is touched."""
    before = contents(place), sorted(place.rglob("*"))
    for call in (plan, run):
        for fresh in (True, False):
            with pytest.raises(UsageError, match=words) as caught:
                call(recipe, RunOptions(Path(output), fresh=fresh, **options))
            assert caught.value.hint
    assert (contents(place), sorted(place.rglob("*"))) == before


@pytest.mark.parametrize("sort", ["model", "artifact"])
@pytest.mark.parametrize("output", ["model", "model/../model", "link", "model/inside", "link/inside", ""])
def test_the_source_model_is_never_the_output(place: Path, output: str, sort: str) -> None:
    (place / "link").symlink_to("model")
    if sort == "artifact":  # it may be one of ours: a model that was only pruned
        put_old_artifact(place / "model")
    refused(rtn(place), place, place / output, "source model")


def test_an_output_that_holds_what_the_run_reads_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: place / name for name in ("data", "held", "tasks", "cwd", "home", "recipes")}
    for folder in inputs.values():
        put_old_artifact(folder)  # even what could be replaced is refused, because it is read
        (folder / "deep").mkdir()
        (folder / "deep" / "text.txt").write_text(STORY)
    monkeypatch.chdir(inputs["cwd"])
    monkeypatch.setenv("HOME", str(inputs["home"] / "deep"))
    data = {
        "model": str(place / "model"),
        "calibration": {"dataset": "../data/deep/text.txt"},
        "stages": [{"quantize": {"method": "gptq", "group_size": 16}}],
        "evaluate": {"perplexity": {"dataset": str(inputs["held"])}, "tasks": ["x"], "task_folder": "../tasks/deep"},
    }
    recipe = parse_recipe(data, base_folder=inputs["recipes"])
    words = {
        "data": "calibration.dataset",
        "held": "perplexity.dataset",
        "tasks": "task_folder",
        "cwd": "current directory",
        "home": "home directory",
        "recipes": "recipe's folder",
    }
    for name, folder in inputs.items():
        refused(recipe, place, folder, words[name])
    refused(recipe, place, ".", "current directory")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("out", "folder"),
        ("out", "file"),
        ("out", "bad manifest"),
        ("out", "dangling link"),
        ("out.partial", "folder"),
        ("out.partial", "file"),
        ("out.report", "folder"),
        ("out.stages", "folder"),
        (".out.old", "folder"),
    ],
)
def test_what_is_not_ours_is_never_replaced(place: Path, name: str, kind: str) -> None:
    path = place / name
    if kind == "file":
        path.write_text("precious")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        (path / ("compress.json" if kind == "bad manifest" else "thesis.txt")).write_text("{}")
    refused(rtn(place), place, place / "out", "compress|already", keep_stages=True)


def test_empty_folders_are_as_good_as_none_with_fresh(place: Path) -> None:
    for name in ("out", "out.partial", "out.report", "out.stages"):
        (place / name).mkdir()
    go(rtn(place), place, fresh=True, keep_stages=True)
    assert (place / "out" / "compress.json").exists() and (place / "out.stages" / "00-quantize").exists()
    go(rtn(place), place, fresh=True, keep_stages=True)  # and all of it is ours


@pytest.mark.parametrize("output", ["/", "//", "..", "here/.."])
def test_an_output_without_a_name_is_a_usage_error(place: Path, output: str) -> None:
    refused(rtn(place), place, output, "cannot be an output")


@pytest.mark.parametrize("output", ["x" * 300, "loop", "loop/out"])
def test_an_output_that_cannot_be_made_is_a_usage_error(place: Path, output: str) -> None:
    (place / "loop").symlink_to("loop")
    with pytest.raises(UsageError):
        run(rtn(place), RunOptions(place / output, fresh=True))


def test_what_starts_finishes_under_the_same_name(place: Path) -> None:
    evaluation = Evaluation(perplexity=Perplexity(dataset="text.txt", window=32))
    open_stages: list[str] = []
    names: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            open_stages.append(event.stage)
            names.append(event.stage)
        elif isinstance(event, Finished):
            assert open_stages.pop() == event.stage

    run(gptq(place).model_copy(update={"evaluate": evaluation}), RunOptions(place / "out"), listen)
    assert open_stages == []
    assert names[:3] == ["run", "quantize gptq", "walk"] and {"verify", "evaluate"} <= set(names)


def test_a_resumed_run_says_where_it_goes_on(place: Path) -> None:
    break_off(gptq(place), place)
    notices: list[Event] = []
    run(gptq(place), RunOptions(place / "out"), notices.append)
    assert Notice("going on behind block 2 of 3", "quantize gptq") in notices


def test_an_output_that_appeared_meanwhile_is_not_replaced(place: Path) -> None:
    break_off(rtn(place), place)
    (place / "out").mkdir()
    with pytest.raises(UsageError, match="output exists"):
        go(rtn(place), place)


def test_two_runs_on_one_output(place: Path) -> None:
    workspace = Workspace(place / "out")
    workspace.partial.mkdir()
    with FolderLock(workspace.partial), pytest.raises(LockError, match=f"process {os.getpid()} "):
        go(rtn(place), place)


@pytest.mark.parametrize("recipe", ["uneven", "too much memory", "quantized", "no disk"])
def test_what_is_refused_before_work_leaves_nothing(
    place: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = sorted(place.iterdir())
    if recipe == "uneven":
        with pytest.raises(UsageError, match="group_size 48"):
            go(gptq(place, group_size=48), place)
    elif recipe == "too much memory":
        with pytest.raises(ResourceError, match="needs about 5.00 GB of memory and 1.00 GB are available"):
            go(shrink(place, plan_memory_bytes=5 * 10**9), place, max_memory_bytes=10**9)
    elif recipe == "no disk":
        monkeypatch.setattr(planning, "free_bytes", lambda path: 10**6)
        with pytest.raises(ResourceError, match="of disk and 1.00 MB are free"):
            go(shrink(place, plan_disk_bytes=10**9), place)
    else:
        source = run(rtn(place), RunOptions(tmp_path_factory.mktemp("other") / "first")).artifact
        quantized = rtn(place).model_copy(update={"model": str(source)})
        with pytest.raises(InputError, match="rtn takes dense or masked weights, but the source first is quantized"):
            go(quantized, place)
    assert sorted(place.iterdir()) == before


def test_the_plan_refuses_what_cannot_fit(place: Path) -> None:
    with pytest.raises(ResourceError, match="of memory"):
        plan(shrink(place, plan_memory_bytes=5 * 10**9), RunOptions(place / "out", max_memory_bytes=10**9))


def test_nothing_is_published_that_does_not_verify(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(folder: Path, **_: Any) -> verify.VerifyReport:
        return verify.VerifyReport(folder, "coverage", [verify.Check("finite", False, "shard 1 holds NaN", 0.0)])

    monkeypatch.setattr(verify, "verify", failing)
    with pytest.raises(ArtifactError, match="not published: finite: shard 1 holds NaN"):
        go(rtn(place), place)
    assert not (place / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_a_usage_error(place: Path) -> None:
    (place / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        run(rtn(place), RunOptions(place / "locked" / "out"))


def test_an_output_below_a_file_is_a_usage_error(place: Path) -> None:
    with pytest.raises(UsageError, match="Not a directory"):
        run(rtn(place), RunOptions(place / "text.txt" / "out"))


def test_speed_is_told_in_the_report_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    asked = {"batches": [1, 2], "prompt_tokens": 4, "output_tokens": 3, "rounds": 1}
    data = {"model": str(tiny_model()), "stages": [{"quantize": {"method": "rtn", "group_size": 16}}]}
    recipe = parse_recipe({**data, "evaluate": {"speed": asked}})
    result = run(recipe, RunOptions(tmp_path / "out"))
    found = result.summary["speed"]["found"]
    assert [rates["batch"] for rates in found] == [1, 2]
    assert all(rate > 0 for rates in found for rate in rates["tokens_per_second"].values())
    assert result.summary["evaluation"] is None
    assert not (result.artifact / "evaluation.json").exists()
    report = (result.report_folder / "report.md").read_text()
    assert "tokens a second, 2 at a time" in report and "first token, ms, 1 at a time" in report
    assert "tokens a second" not in (result.artifact / "README.md").read_text()
    without = run(recipe, RunOptions(tmp_path / "none", evaluate=False))
    assert without.summary["speed"] is None


def test_the_model_is_measured_behind_each_stage(place: Path) -> None:
    stages = [
        {"prune": {"method": "magnitude", "sparsity": 0.5}},
        {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 16}},
    ]
    perplexity = {"dataset": "text.txt", "window": 16}
    evaluation = {"perplexity": perplexity, "through": "transformers", "stages": True}
    recipe = parse_recipe({"model": "model", "stages": stages, "evaluate": evaluation}, base_folder=place)
    result = run(recipe, RunOptions(place / "out", keep_stages=True))
    pruned, quantized = (stage["worth"] for stage in result.summary["stages"])
    found = result.summary["evaluation"]
    assert {key: quantized[key] for key in ("perplexity", "kl")} == {key: found[key] for key in ("perplexity", "kl")}
    asked = Evaluation(perplexity=Perplexity(dataset=str(place / "text.txt"), window=16), through="transformers")
    again = evaluate_folder(next(place.glob("out.stages/00-*")), asked, base=place / "model")
    assert pruned["perplexity"] == again["perplexity"] and pruned["kl"] == again["kl"]
    assert pruned["kl"]["mean"] != quantized["kl"]["mean"]
    assert (
        f"| magnitude 50 % | {again['perplexity']['artifact']:.4g}" in (result.report_folder / "report.md").read_text()
    )
    without = evaluation | {"stages": False}
    recipe = parse_recipe({"model": "model", "stages": stages, "evaluate": without}, base_folder=place)
    assert [stage["worth"] for stage in run(recipe, RunOptions(place / "less")).summary["stages"]] == [None, None]
