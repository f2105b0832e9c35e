"""Tasks: a folder of task files, offline; figures against lm-eval's own aggregation; pairing and repeatability."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, RecipeError
from compress.core.events import Progress
from compress.core.recipe import Evaluation
from compress.evaluate import evaluate
from compress.evaluate.task_files import choose, read_task_folder, require_tasks
from compress.evaluate.tasks import aggregated

CHOICE = """
task: next_letter
tag: letters
dataset_path: json
dataset_kwargs: {data_files: {test: data/letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ start }}"
doc_to_choice: "{{ choices }}"
doc_to_target: "{{ answer }}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
ROLLING = """
task: letters_text
tag: letters
dataset_path: json
dataset_kwargs: {data_files: {test: data/letters.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{ start }}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
GENERATE = """
task: write_letter
dataset_path: json
dataset_kwargs: {data_files: {test: data/letters.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{ start }}"
doc_to_target: "{{ choices[answer] }}"
generation_kwargs: {max_gen_toks: 2, do_sample: false, until: ["."]}
metric_list:
  - {metric: exact_match}
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "generate": GENERATE}.items():
        (folder / f"{name}.yaml").write_text(text)
    rows = [
        {"start": " ".join("abcdefghijkl"[i : i + 4]), "choices": ["a", "m", "z", "the"], "answer": i % 4}
        for i in range(8)
    ] * 4
    (folder / "data" / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_of_tasks_runs_with_no_network_and_no_noise(tiny_models, task_folder, no_network, capfd):
    original, artifact = map(Checkpoint.open, tiny_models)
    asked = Evaluation(tasks=("letters", "write_letter"), task_folder=str(task_folder))
    heard = []
    result = evaluate(original, artifact, asked, dtype="float32", events=heard.append)
    assert set(result["tasks"]) == {"next_letter", "letters_text", "write_letter"}
    choice = result["tasks"]["next_letter"]["acc"]
    assert choice["n"] == 32
    assert choice["difference"] == pytest.approx(choice["artifact"] - choice["original"], abs=1e-6)
    assert choice["interval"][0] <= choice["difference"] <= choice["interval"][1]
    words = result["tasks"]["letters_text"]["word_perplexity"]
    assert words["original"] != words["artifact"]
    assert words["stderr"]["artifact"] > 0
    assert "exact_match" in result["tasks"]["write_letter"]
    protocol = result["protocol"]["tasks"]["tasks"]["next_letter"]
    assert protocol["documents"] == 32
    assert len(protocol["request_sha256"]) == 64
    assert str(task_folder) not in json.dumps(result)
    assert any(isinstance(event, Progress) for event in heard)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert json.dumps(result, allow_nan=False) == json.dumps(
        evaluate(original, artifact, asked, dtype="float32"), allow_nan=False
    )


def test_rolling_text_is_scored_after_one_start_token(tiny_models, task_folder):
    asked = Evaluation(tasks=("letters_text",), task_folder=str(task_folder), limit=8)
    result = evaluate(None, Checkpoint.open(tiny_models[1]), asked, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tiny_models[1], dtype=torch.float32)
    loss = size = 0.0
    for start in range(8):
        ids = torch.tensor([[1, *range(3 + start, 7 + start)]])
        with torch.no_grad():
            loss += model(ids, labels=ids).loss.item() * 4
        size += len("a b c d")
    measured = result["tasks"]["letters_text"]["bits_per_byte"]["artifact"]
    assert measured == pytest.approx(loss / size / np.log(2), rel=1e-4)


def test_limit_and_the_artifact_alone(tiny_models, task_folder):
    asked = Evaluation(tasks=("next_letter",), task_folder=str(task_folder), limit=5)
    result = evaluate(None, Checkpoint.open(tiny_models[1]), asked)
    figures = result["tasks"]["next_letter"]["acc"]
    assert (figures["n"], figures["original"], figures["difference"]) == (5, None, None)
    assert "limited to 5 documents" in result["notices"][0]


@pytest.mark.parametrize("name", ["mean", "perplexity", "weighted_perplexity", "bits_per_byte", "median"])
def test_aggregations_equal_lm_evals_own_on_drawn_documents(name):
    from lm_eval.api import metrics

    generator = np.random.default_rng(0)
    values = [float(-v) for v in generator.random(9)]
    if name in ("weighted_perplexity", "bits_per_byte"):
        values = [(value, int(weight)) for value, weight in zip(values, generator.integers(1, 9, 9), strict=True)]
    aggregate = getattr(metrics, name)
    counts = generator.multinomial(9, np.full(9, 1 / 9), size=3).astype(float)
    drawn = [[v for v, c in zip(values, row, strict=True) for _ in range(int(c))] for row in counts]
    assert aggregated(aggregate, values)(counts) == pytest.approx([aggregate(each) for each in drawn])


def test_tags_groups_and_includes_are_found(task_folder):
    (task_folder / "more.yaml").write_text("include: choice.yaml\ntask: variant\nnum_fewshot: 2\n")
    (task_folder / "group.yaml").write_text("group: all_of_it\ntask: [next_letter, variant]\n")
    tasks = read_task_folder(task_folder)
    assert {config["task"] for config in tasks["letters"]} == {"next_letter", "letters_text", "variant"}
    assert [config["task"] for config in tasks["all_of_it"]] == ["next_letter", "variant"]
    assert tasks["variant"][0]["output_type"] == "multiple_choice"
    files = tasks["next_letter"][0]["dataset_kwargs"]["data_files"]
    assert files["test"] == str(task_folder / "data" / "letters.jsonl")
    configs, names = choose(("all_of_it", "hellaswag", "variant"), task_folder)
    assert len(configs) == 2
    assert names == ["hellaswag"]


def test_names_that_lm_eval_knows_are_left_to_it(task_folder):
    # of lm-eval's own: a task, a group, a tag that only a template names, a pattern
    names = (
        "next_letter",
        "hellaswag",
        "mmlu",
        "acp_bench",
        "mmlu_*",
    )
    require_tasks(Evaluation(tasks=names, task_folder=str(task_folder)))
    for place in (None, str(task_folder)):
        with pytest.raises(RecipeError, match="no such task: helaswag, n"):
            require_tasks(Evaluation(tasks=("hellaswag", "helaswag"), task_folder=place))


REFUSED = {
    "no folder": (None, "no such task folder"),
    "no task": ("a: 1", "holds no task"),
    "python": ("task: t\nprocess_docs: !function utils.run", "refused"),
    "data file missing": ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}", "no such data file"),
    "circle": ("task: t\ninclude: t.yaml", "circle"),
    "group of strangers": ("group: g\ntask: [stranger]", "no file of the folder defines|holds no task"),
    "not a mapping": ("- 1", "mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_task_folders_are_refused(case, tmp_path):
    text, message = REFUSED[case]
    folder = tmp_path / "tasks"
    if text is not None:
        folder.mkdir()
        (folder / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_task_folder(folder)
    assert "\n" not in str(caught.value)


def test_chat_template_without_one_is_refused(tiny_models, task_folder):
    asked = Evaluation(tasks=("next_letter",), task_folder=str(task_folder), chat_template=True)
    with pytest.raises(InputError, match="needs a template"):
        evaluate(None, Checkpoint.open(tiny_models[1]), asked)
