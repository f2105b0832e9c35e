"""compress generate: the answer alone on standard output, as it comes; clean ends; one sentence for bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.llm import LLM
from runtime.sample import Update

PROMPT = "Once upon a time"
FEW = ("--max-tokens", "12")


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def answer(model: Path) -> str:
    [completion] = LLM(model).generate(PROMPT, max_tokens=12)
    assert len(completion.token_ids) == 12
    return completion.text


@pytest.fixture
def chat_model(model: Path, tmp_path: Path) -> Path:
    """The model with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('says no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
    )
    return folder


def line(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def test_standard_output_is_the_answer_alone(call, model: Path, answer: str) -> None:
    called = call("generate", model, PROMPT, *FEW)
    assert called.code == 0, called.err
    assert called.out == line(answer)
    assert "12 tokens in" in called.err
    assert "tokens/s" in called.err
    assert "; ended by length\n" in called.err
    quiet = call("generate", model, PROMPT, *FEW, "--quiet")
    assert (quiet.out, quiet.err) == (line(answer), "")


def test_the_prompt_comes_from_a_file_or_standard_input(call, model: Path, answer: str, tmp_path, monkeypatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n")
    assert call("generate", model, "--file", file, *FEW).out == line(answer)
    for arguments in (("-",), ("--file", "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
        assert call("generate", model, *arguments, *FEW).out == line(answer)


def test_json_is_one_object_per_line_with_text_as_it_comes(call, model: Path, answer: str) -> None:
    called = call("generate", model, PROMPT, *FEW, "--json")
    *parts, summary = called.objects
    assert "".join(part["text"] for part in parts) == answer
    assert sum(len(part["token_ids"]) for part in parts) == summary["tokens"] == 12
    assert len(parts) >= 12, "token by token"
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"] == summary["finish_reasons"]
    assert called.err == ""


def test_several_answers_come_one_after_the_other(call, model: Path) -> None:
    drawn = LLM(model).generate(PROMPT, max_tokens=12, temperature=1.5, seed=5, n=3)
    assert len({completion.text for completion in drawn}) == 3
    called = call("generate", model, PROMPT, *FEW, "--temperature", "1.5", "--seed", "5", "--n", "3")
    assert called.out == "\n".join(line(completion.text) for completion in drawn)
    assert "; the answers ended by length, length, length" in called.err


def test_options_of_sampling_reach_the_sampler(call, model: Path, answer: str) -> None:
    for arguments in (("--top-k", "1"), ("--top-p", "0.0001"), ("--min-p", "1.0")):
        called = call("generate", model, PROMPT, *FEW, "--temperature", "5", *arguments)
        assert called.out == line(answer), arguments
    stopped = call("generate", model, PROMPT, *FEW, "--stop", answer[4:6], "--json").objects[-1]
    assert stopped["finish_reasons"] == ["stop"]
    exact = call("generate", model, PROMPT, *FEW, "--numerics", "exact")
    assert exact.out == line(LLM(model, numerics="exact").generate(PROMPT, max_tokens=12)[0].text)
    assert "temperature 0" in call("generate", model, PROMPT, *FEW, "--top-k", "3").err


def test_without_max_tokens_a_long_prompt_gets_what_there_is_room_for(call, model: Path) -> None:
    summary = call("generate", model, "a" * 250, "--json").objects[-1]
    assert summary["tokens"] <= 256 - summary["prompt_tokens"]
    assert summary["tokens"] > 0


def test_the_prompt_goes_into_the_chat_template(call, chat_model: Path, model: Path) -> None:
    rendered = LLM(model).generate("[user]hello[answer]", max_tokens=12, special_tokens=False)[0].text
    assert call("generate", chat_model, "hello", *FEW, "--chat").out == line(rendered)
    refused = call("generate", chat_model, "no", *FEW, "--chat")
    assert (refused.code, refused.out) == (3, "")
    assert "the chat template fails: says no" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "give one prompt"),
        ((PROMPT, "--file", "x"), 2, "give one prompt"),
        (("--file", "/nowhere/x"), 3, "cannot be read"),
        ((PROMPT, "--chat"), 2, "the tokenizer has no chat template"),
        ((PROMPT, "--numerics", "slow"), 2, "fast or exact"),
        ((PROMPT, "--top-p", "2"), 2, "top_p must be from 0 to 1"),
        ((PROMPT, "--n", "0"), 2, "n must be from 1"),
        ((PROMPT, "--device", "abacus"), 2, "unknown device"),
        ((PROMPT, "--max-tokens", "1000"), 2, "256 tokens a sequence may have"),
    ],
)
def test_bad_input_is_one_sentence(call, model: Path, arguments, code: int, says: str) -> None:
    called = call("generate", model, *arguments)
    assert (called.code, called.out) == (code, "")
    assert says in called.err
    assert call("generate", model, *arguments, "--json").objects[-1]["exit_code"] == code


def test_folders_and_files_that_are_none_are_refused(call, model: Path, tmp_path: Path) -> None:
    assert call("generate", tmp_path / "nowhere", PROMPT).code == 3
    assert call("generate", tmp_path / "nowhere", PROMPT, "--chat").code == 3
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    called = call("generate", model, "--file", tmp_path / "latin")
    assert called.code == 3
    assert "is not UTF-8 text: byte 3 is 0xe9" in called.err


def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(call, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    called = call("generate", folder, PROMPT)
    assert called.code == 3
    assert "has no tokenizer" in called.err
    assert "copy tokenizer.json" in called.err


def test_a_model_that_breaks_down_is_an_error(call, model: Path, monkeypatch) -> None:
    monkeypatch.setattr(LLM, "stream", lambda *_, **__: iter([Update("r", 0, "half", (1,), "error")]))
    called = call("generate", model, PROMPT)
    assert (called.code, called.out) == (3, "half\n")
    assert "no usable logits" in called.err


def test_a_terminal_is_sent_no_control_characters_and_a_file_all(call, model: Path, monkeypatch) -> None:
    def stream(self: LLM, *_: object, **__: object) -> Iterator[Update]:
        yield Update("r", 0, "a\x1b[2Jb", (1,), "stop")

    monkeypatch.setattr(LLM, "stream", stream)
    assert call("generate", model, PROMPT).out == "a\x1b[2Jb\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert call("generate", model, PROMPT).out == "a[2Jb\n"


def test_ctrl_c_ends_the_line_and_the_command_with_130(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "compress",
        "generate",
        model,
        PROMPT,
        "--temperature",
        "1",
        "-n",
        "256",
    ]  # fills the pipe
    child = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is started deaf to it
    )
    first = child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert first
    assert child.returncode == 130, err
    assert (first + out).endswith(b"\n")
    assert err.decode().splitlines() == ["interrupted"]


def test_json_lines_hold_text_that_is_not_ascii(call, model: Path, monkeypatch) -> None:
    monkeypatch.setattr(LLM, "stream", lambda *_, **__: iter([Update("r", 0, "é\n", (1,), "stop")]))
    first = call("generate", model, PROMPT, "--json").out.splitlines()[0]
    assert json.loads(first)["text"] == "é\n"
