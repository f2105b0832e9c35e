"""Every error becomes one sentence and its exit code; untrusted text cannot speak to the terminal."""

import subprocess
import sys

import pytest

from compress.cli import console
from compress.core import errors

CODES = {
    errors.UsageError: 2,
    errors.RecipeError: 2,
    errors.InputError: 3,
    errors.ArtifactError: 3,
    errors.ResourceError: 4,
    errors.LockError: 4,
    errors.GateError: 5,
    errors.EnvironmentRefused: 6,
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """failing(error): from now on `compress doctor` raises it."""

    def arrange(error: BaseException) -> None:
        def raise_it() -> None:
            raise error

        monkeypatch.setattr("compress.doctor.examine", raise_it)

    return arrange


@pytest.mark.parametrize("kind", CODES)
def test_each_kind_of_error_has_its_exit_code(kind: type[errors.CompressError], failing, call) -> None:
    failing(kind("it went wrong", where="file.x", hint="do this"))
    called = call("doctor")
    assert called.code == CODES[kind]
    assert called.out == ""
    assert called.err == "error: file.x: it went wrong\n  hint: do this\n"
    called = call("doctor", "--json")
    assert called.code == CODES[kind]
    assert called.err == ""
    assert called.objects == [
        {"event": "error", "schema_version": 1, "exit_code": CODES[kind], "message": "it went wrong", "where": "file.x",
         "hint": "do this"}
    ]  # fmt: skip


def test_a_bug_is_called_a_bug_and_shows_its_traceback_only_if_asked(failing, call, monkeypatch) -> None:
    failing(ValueError("surprise"))
    called = call("doctor")
    assert called.code == 1
    assert "this is a bug in compress: ValueError: surprise" in called.err
    assert "Traceback" not in called.err
    assert "COMPRESS_TRACEBACK=1" in called.err
    assert "Traceback" in call("doctor", "-v").err
    monkeypatch.setenv("COMPRESS_TRACEBACK", "1")
    assert "Traceback" in call("doctor").err


def test_an_interruption_is_130(failing, call) -> None:
    """One line for people, one object with --json; typer alone would end without a word."""
    failing(KeyboardInterrupt())
    called = call("doctor")
    assert (called.code, called.out, called.err) == (130, "", "interrupted\n")
    called = call("doctor", "--json")
    assert (called.code, called.err) == (130, "")
    assert called.objects == [{"event": "summary", "schema_version": 1, "command": "doctor", "exit_code": 130}]


def test_eval_can_be_interrupted(monkeypatch: pytest.MonkeyPatch, call) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.evaluate.evaluate_folder", interrupted)
    called = call("eval", "demo", "--text", "demo")
    assert (called.code, called.out, called.err) == (130, "", "interrupted\n")


def test_a_place_that_takes_no_folders_is_an_output_to_change_not_to_resume(tiny_model, call) -> None:
    called = call("run", "--recipe", "rtn-w8a16", "--model", tiny_model("llama"), "--output", "/proc/x")
    assert called.code == 2, called.err
    assert "/proc/x.partial: cannot make the folder" in called.err
    assert "choose an output that you may write to" in called.err
    assert "again" not in called.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["run"], "Missing option '--recipe'"),
        (["run", "--recip", "x"], "No such option: --recip"),
        (["verify", "x", "--level", "all"], "error: Invalid value for '--level': 'all' is not one of"),
        (["run", "--recipe", "demo-w5"], "did you mean demo-w4?"),
        (["run", "--recipe", "no/such.yaml"], "cannot read the recipe: No such file or directory"),
        (["run", "--recipe", "demo-w4", "--dtype", "flaot32"], "did you mean float32?"),
        (["run", "--recipe", "demo-w4", "--device", "gpu"], "unknown device 'gpu'"),
        (["run", "--recipe", "demo-w4", "--set", "stages[0].quantize.bits=3"], "stages[0].quantize.bits: unknown key"),
        (["run", "--recipe", "demo-w4", "--set", "stages[0].quantize.method=../x"], "or package.module, no path"),
        (["compare", "one"], "two artifacts or more"),
        (["push", "x", "no-owner"], "is no repository"),
        (["calibrate", "--recipe", "rtn-w8a16"], "the recipe has no calibration"),
        (["calibrate", "--recipe", "demo-w4", "--output", "x.txt"], "written as .safetensors"),
        (["eval", "nowhere"], "nothing says what to measure"),
        (["recipes", "init", "--model", "demo", "--budget", "lots"], "should be a size such as"),
    ],
)
def test_wrong_usage_is_2_with_advice(arguments: list[str], words: str, call) -> None:
    called = call(*arguments)
    assert called.code == 2, called.err
    assert words in " ".join(called.err.split())
    assert called.out == ""
    assert "Traceback" not in called.err


def test_a_recipe_error_shows_line_and_caret(recipe_file, call) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("group_size", "group_sise"))
    called = call("run", "--recipe", recipe_file)
    assert called.code == 2
    lines = called.err.splitlines()
    assert lines[0] == f"error: {recipe_file}:3:44: stages[0].quantize.group_sise: unknown key"
    assert lines[1].index("group_sise") == lines[2].index("^")
    assert lines[3] == "  hint: did you mean group_size?"


HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "a\x08\x08b",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "zero\u200bwidth",
    "\ufeffbom",
    "[bold]x[/bold]",
    "[link=http://evil]x[/link]",
    "[/nothing]",
    ":smile:",
    "\x00",
    "\ud800",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str, failing, call) -> None:
    failing(errors.InputError(f"model {text} is bad", where=text, hint=text))
    called = call("doctor")
    assert called.code == 3
    assert not [letter for letter in called.err if ord(letter) < 32 and letter != "\n"]
    assert not set(called.err) & set("\x7f\x9b\u202e\u2066\u2069\u200b\ufeff\ud800")
    if text.startswith(("[", ":")):
        assert text in called.err, "markup is text"


def test_clean_keeps_what_people_write() -> None:
    text = "naïve – 模型 → 4 bit\tσ\nnext"
    assert console.clean(text) == text


def test_a_closed_pipe_makes_no_noise() -> None:
    command = f"{sys.executable} -m compress recipes schema | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_quiet_hides_the_attempts_of_the_hubs_client(call, recipe_file, tmp_path, monkeypatch, caplog) -> None:
    """A port that nobody listens to, asked twice by the client itself, as it does without a network."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from huggingface_hub.utils import http_backoff

    def load(*_: object, **__: object) -> None:
        try:
            http_backoff("HEAD", "http://127.0.0.1:9/x", max_retries=1, base_wait_time=0.01)
        except HTTPError as error:
            raise ConnectionError("Couldn't reach it") from error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    asked = ("calibrate", "-r", recipe_file, "-m", "demo", "-o", tmp_path / "ids.safetensors")
    asked += ("--set", "calibration.dataset=owner/texts", "--set", "calibration.length=64")
    loud = call(*asked)
    assert loud.code == 3 and "Retrying in" in caplog.text, loud.err
    caplog.clear()
    quiet = call(*asked, "--quiet")
    assert quiet.code == 3 and caplog.text == ""
    assert quiet.err.startswith("error: owner/texts: the hub dataset cannot be loaded: Couldn't reach it")
