"""A tiny model through the whole command line: dry run, run, gate, verify, inspect, eval, report, compare, push."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """\
model: no/model
calibration: {{dataset: calibration.txt, samples: 4, length: 32}}
stages:
  - quantize: {{method: gptq, scheme: w4a16, group_size: 32}}
evaluate:
  perplexity: {{dataset: held-out.txt, window: 64, documents: true}}
gate: {{max_size: {size}}}
"""
TEXT = "\n\n".join(f"Story {n}: the cat sat on the mat and looked at {n} birds until it was dark." for n in range(40))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "calibration.txt").write_text(TEXT)
    (folder / "held-out.txt").write_text(TEXT[:600])
    (folder / "tiny.yaml").write_text(RECIPE.format(size="1GB"))
    (folder / "strict.yaml").write_text(RECIPE.format(size="1kB"))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path, tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact made by the command line in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "artifact"
    command = [
        sys.executable,
        "-m",
        "compress",
        "run",
        "-r",
        recipe,
        "-m",
        tiny_model("llama"),
        "-o",
        output,
        "--quiet",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n", "quiet prints the result alone"
    assert done.stderr == ""
    return output


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(call, recipe: Path, tiny_model, tmp_path: Path) -> None:
    output = tmp_path / "out"
    called = call("run", "-r", recipe, "-m", tiny_model("llama"), "-o", output, "--dry-run")
    assert called.code == 0, called.err
    assert "w4a16, groups of 32" in called.out
    for words in ("weights", "peak memory", "disk while it runs", "time", "vLLM", "nothing was written"):
        assert words in called.out
    assert max(len(line) for line in called.out.splitlines() if "nothing was written" not in line) <= 80
    every = call("run", "-r", recipe, "-m", tiny_model("llama"), "-o", output, "--dry-run", "-v")
    assert "model.layers.0.self_attn.q_proj" in every.out
    assert list(tmp_path.iterdir()) == []


def test_the_plan_is_exact_in_bytes(call, recipe: Path, tiny_model, finished: Path, tmp_path: Path) -> None:
    asked = ("run", "-r", recipe, "-m", tiny_model("llama"), "-o", tmp_path / "out", "--dry-run", "--json")
    planned = call(*asked).objects[-1]
    run = json.loads((finished.parent / "artifact.report" / "run.json").read_text())
    assert planned["bytes"] == run["measured"]["bytes"]
    assert planned["preflight"]


def test_json_is_one_object_per_line_and_ends_with_a_summary(call, recipe: Path, tiny_model, tmp_path: Path) -> None:
    called = call("run", "-r", recipe, "-m", tiny_model("llama"), "-o", tmp_path / "out", "--json")
    assert called.code == 0, called.err
    assert called.err == ""
    kinds = [item["event"] for item in called.objects]
    assert {"started", "progress", "metric", "finished"} <= set(kinds)
    assert kinds[-1] == "summary" and kinds.count("summary") == 1
    summary = called.objects[-1]
    assert summary["schema_version"] == 1
    assert summary["exit_code"] == 0
    assert summary["evaluation"]["perplexity"]["artifact"] > 1
    assert summary["artifact"]["bits_per_weight"] > 4
    assert Path(summary["report"]).is_file()


def test_people_see_a_table_and_where_the_report_is(
    call, recipe: Path, tiny_model, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    called = call("run", "-r", recipe, "-m", tiny_model("llama"), "-o", "out")
    assert called.code == 0, called.err
    for words in ("original", "compressed", "size of weights", "bits per weight", "perplexity", "KL divergence",
                  "peak memory", "report.html", "artifact"):  # fmt: skip
        assert words in called.out
    assert max(len(line) for line in called.out.splitlines() if "/" not in line) <= 80
    assert "→ out on" in called.err
    again = call("run", "-r", recipe, "-m", tiny_model("llama"), "-o", "out")
    assert again.code == 2
    assert "output exists" in again.err and "--fresh" in again.err


def test_fresh_destroys_nothing_that_is_not_an_artifact(call, recipe: Path, tiny_model, tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    shutil.copytree(tiny_model("llama"), model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for output in (model, model.parent, model / "inside", tmp_path / "mine", recipe.parent, Path.cwd(), "/"):
        called = call("run", "-r", recipe, "-m", model, "-o", output, "--fresh")
        assert called.code == 2, called.err
        assert "choose another --output" in " ".join(called.err.split()) or output == "/"
    assert sorted(tmp_path.rglob("*")) == before and recipe.is_file()


def test_a_missed_gate_is_5_and_leaves_artifact_and_report(call, recipe: Path, tiny_model, tmp_path: Path) -> None:
    called = call("run", "-r", recipe.with_name("strict.yaml"), "-m", tiny_model("llama"), "-o", tmp_path / "out")
    assert called.code == 5
    assert "gate: the artifact takes" in called.err
    assert (tmp_path / "out" / "compress.json").is_file()
    assert (tmp_path / "out.report" / "report.html").is_file()


def test_only_the_stages_of_a_kind_are_run(call, recipe: Path, tiny_model, tmp_path: Path) -> None:
    asked = ("-m", tiny_model("llama"), "-o", tmp_path / "out", "--dry-run")
    assert call("quantize", "-r", recipe, *asked).code == 0
    called = call("prune", "-r", recipe, *asked)
    assert called.code == 2 and "the recipe has no prune stage, it has quantize" in called.err
    both = recipe.with_name("both.yaml")
    both.write_text(recipe.read_text().replace("stages:\n", "stages:\n  - prune: {method: magnitude}\n"))
    called = call("prune", "-r", both, *asked)
    assert called.code == 0 and "stages[1] (quantize) is left out" in called.err
    assert "50 % zeros" in called.out and "w4a16" not in called.out


def test_interrupted_it_says_how_to_go_on_and_goes_on(recipe: Path, tiny_model, finished: Path, tmp_path: Path) -> None:
    """Ctrl-C after the first durable block: exit 130, a resume line without --fresh, and the same bytes at the end."""
    output = tmp_path / "out"
    command = [
        *map(str, (sys.executable, "-m", "compress", "run", "-r", recipe, "-m", tiny_model("llama"), "-o", output))
    ]
    code, err = 0, ""
    for _ in range(10):  # on a busy machine the run may be over before the signal is sent
        process = subprocess.Popen(
            [*command, "--fresh"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        journal = tmp_path / "out.partial" / "journal.jsonl"
        while process.poll() is None and not journal.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        code = process.returncode
        if code:
            break
    assert code == 130, err
    assert "To go on:" in err
    assert "Traceback" not in err
    resume = err.split("To go on:\n")[1].splitlines()[0]
    assert "--fresh" not in resume and resume.strip().startswith("compress run")
    subprocess.run(command, check=True, capture_output=True)
    for path in finished.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


def test_verify_says_what_it_checked(call, finished: Path, tiny_model, tmp_path: Path) -> None:
    called = call("verify", finished, "--source", tiny_model("llama"))
    assert called.code == 0, called.out
    assert "checks passed" in called.out
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(finished), str(broken)], check=True)
    shard = next(broken.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    called = call("verify", broken, "--quiet")
    assert called.code == 3
    assert "failed" in called.out
    assert call("verify", broken, "--json").objects[-1]["exit_code"] == 3


def test_inspect_names_scheme_and_source(call, finished: Path) -> None:
    called = call("inspect", finished)
    assert called.code == 0, called.err
    assert "w4a16" in called.out
    assert max(map(len, called.out.splitlines())) <= 80
    assert call("inspect", finished, "--json").objects[-1]["event"] == "summary"
    [line] = call("inspect", finished, "--quiet").out.splitlines()
    assert line.startswith(f"{finished}: llama, ") and line.endswith(", compressed-tensors")


def test_eval_of_an_artifact_needs_no_options(call, finished: Path, recipe: Path, tiny_model) -> None:
    text = recipe.with_name("held-out.txt")
    called = call("eval", finished, "--against", tiny_model("llama"), "--text", text, "--window", "64")
    assert called.code == 0, called.err
    assert "perplexity" in called.out and "KL divergence" in called.out
    alone = call("eval", finished, "--recipe", recipe, "--json")
    assert alone.code == 0, alone.out
    assert alone.objects[-1]["evaluation"]["perplexity"]["original"] is None


def test_calibrate_writes_tokens_that_a_recipe_can_use(call, recipe: Path, tiny_model, tmp_path: Path) -> None:
    tokens = tmp_path / "ids.safetensors"
    called = call("calibrate", "-r", recipe, "-m", tiny_model("llama"), "-o", tokens)
    assert called.code == 0, called.err
    assert "4 samples of 32 tokens" in called.out
    asked = (
        "run",
        "-r",
        recipe,
        "-m",
        tiny_model("llama"),
        "--set",
        f"calibration.dataset={tokens}",
        "-o",
        tmp_path / "o",
    )
    assert call(*asked, "--dry-run").code == 0


def test_report_and_compare_write_pages(call, finished: Path, tmp_path: Path) -> None:
    called = call("report", finished, "--output", tmp_path / "again")
    assert called.code == 0, called.err
    first = (finished.parent / "artifact.report" / "report.html").read_bytes()
    assert (tmp_path / "again" / "report.html").read_bytes() == first
    called = call("compare", finished, finished, "--output", tmp_path / "both")
    assert called.code == 0, called.err
    assert list((tmp_path / "both").glob("*.html"))
    assert call("report", tmp_path).code == 3
