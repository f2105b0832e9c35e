"""`compress generate`: an artifact answers a prompt through the runtime, to the terminal as the tokens come."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import Output, clean, speak
from compress.cli.kv_option import KVOption, kv_settings

if TYPE_CHECKING:
    from kv_compress.stage import KVCache
    from runtime.llm import LLM
    from runtime.params import SamplingParams
    from runtime.sample import Update

_USUAL_TOKENS = 128


def generate(
    artifact: opt.ArtifactFolder,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="File with the prompt, UTF-8.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Tokens at most. [default: 128, or what there is room for]"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Among those that make up this share.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="None below this share of the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="For the same answer again.", show_default=False)] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be repeated.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Answers to give.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    numerics: opt.Numerics = "fast",
    device: opt.Device = "auto",
    sparse: opt.Sparse = "auto",
    kv_cache: KVOption = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Let a model answer a prompt.

    The answer alone goes to standard output. A final newline of a prompt from a file or standard input is left out.
    """
    output = speak(json=json, quiet=quiet)
    opt.check_numerics(numerics)
    opt.check_sparse(sparse)
    kept = kv_settings(kv_cache)
    from runtime.params import SamplingParams

    text = _prompt(prompt, file)
    params = SamplingParams(
        max_tokens=_USUAL_TOKENS if max_tokens is None else max_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, seed=seed, stop=tuple(stop or ()), n=n,
    )  # fmt: skip
    if params.greedy and (n > 1 or (top_k, top_p, min_p, seed) != (0, 1.0, 0.0, None)):
        output.tell("temperature 0 always takes the likeliest token: give --temperature to sample", style="yellow")
    artifact = opt.model_folder(artifact)
    _require_tokenizer(artifact)
    if chat:
        text = _chat_prompt(artifact, text)
    llm = _load(output, artifact, numerics, opt.choose_device(device), sparse, kept)
    ids = llm.encode(text, special_tokens=not chat)
    if max_tokens is None:
        params = _fitting(params, llm.max_length - len(ids))
    _answer(output, llm, ids, params)


def _load(output: Output, artifact: Path, numerics: str, device: str, sparse: str, kept: "KVCache | None") -> "LLM":
    """The model, and what there is to say about its layers."""
    from compress.benchmark.fallbacks import sentences
    from compress.core.checkpoint import Checkpoint
    from runtime.llm import LLM

    checkpoint = Checkpoint.open(artifact)
    policy = None if kept is None else kept.policy(checkpoint)
    llm = LLM(checkpoint, numerics=numerics, device=device, sparse=sparse, kv_cache=policy)  # type: ignore[arg-type]  all are checked
    for sentence in sentences(llm.engine.runner.model.slow_reasons):
        output.tell(sentence, style="yellow")
    return llm


def _require_tokenizer(folder: Path) -> None:
    """InputError for a model that no text can be given to, before it is loaded."""
    from compress.core._model_folder import TOKENIZER_FILES
    from compress.core._verify_gguf import gguf_file
    from compress.core.errors import InputError

    if gguf_file(folder) is not None:
        raise InputError("holds a GGUF file, which the runtime does not read", where=str(folder), hint="llama.cpp does")
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            "the folder has no tokenizer: a text cannot become tokens",
            where=str(folder),
            hint="copy tokenizer.json and tokenizer_config.json of the original into it",
        )


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text, wherever it stands."""
    from compress.core.errors import InputError, UsageError

    if (prompt is None) == (file is None):
        raise UsageError(
            "give one prompt: as an argument, with --file, or with - from standard input",
            hint='compress generate ARTIFACT "Once upon a time"',
        )
    where = str(file) if file else "standard input"
    if prompt is not None and prompt != "-":
        return prompt
    try:
        data = sys.stdin.buffer.read() if file is None or str(file) == "-" else file.read_bytes()
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}", where=where
        ) from None


def _chat_prompt(folder: Path, text: str) -> str:
    """The prompt as one user message of a chat. The template is the artifact's: it runs in jinja's sandbox."""
    import jinja2

    from compress.core.checkpoint import load_tokenizer
    from compress.core.errors import InputError, UsageError

    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder))
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template", where=str(folder), hint="leave --chat out")
    try:
        message = {"role": "user", "content": text}
        return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template fails: {error}", where=str(folder)) from None


def _fitting(params: "SamplingParams", room: int) -> "SamplingParams":
    """As many tokens as usual, or as there is room for; at least one, so that a prompt that is too long is refused."""
    from dataclasses import replace

    return replace(params, max_tokens=max(1, min(params.max_tokens, room)))


def _answer(output: Output, llm: "LLM", ids: list[int], params: "SamplingParams") -> None:
    writer = _Writer(output, params.n)
    start = time.perf_counter()
    times: list[float] = []
    try:
        for update in llm.stream(ids, params):
            times += [time.perf_counter() - start] * len(update.token_ids)
            writer.take(update)
    finally:
        writer.end_line()
    if "error" in writer.reasons:
        from compress.core.errors import InputError

        raise InputError("the model gives no usable logits", hint="compress verify says whether its weights are whole")
    facts = {
        "prompt_tokens": len(ids),
        "tokens": len(times),
        "seconds": times[-1] if times else 0.0,
        "first_token_seconds": times[0] if times else None,
        "tokens_per_second": len(times) / times[-1] if times else None,
        "finish_reasons": writer.reasons,
    }
    if times:
        output.tell(_summary(facts), style="dim")
        output.tell(_capacity(llm), style="dim")
    output.finish("generate", **facts, kv_pool_bytes=llm.ledger.kv_pool_bytes, kv_tokens=llm.kv_tokens)


def _summary(facts: dict[str, Any]) -> str:
    reasons = facts["finish_reasons"]
    ended = "ended by" if len(reasons) == 1 else "the answers ended by"
    return (
        f"{facts['tokens']} tokens in {facts['seconds']:.2f} s, {facts['tokens_per_second']:.1f} tokens/s; the "
        f"first after {facts['first_token_seconds']:.2f} s, from {facts['prompt_tokens']} tokens of prompt; "
        f"{ended} {', '.join(reasons)}"
    )


def _capacity(llm: "LLM") -> str:
    from compress.benchmark.measure import kept_as
    from compress.core.quantities import format_bytes

    size = format_bytes(llm.ledger.kv_pool_bytes)
    return f"the pool of keys and values takes {size} and holds {llm.kv_tokens:,} tokens ({kept_as(llm)})"


class _Writer:
    """Standard output: the answers one after the other, the one whose turn it is as its tokens come."""

    def __init__(self, output: Output, answers: int) -> None:
        self.reasons = [""] * answers
        self._output = output
        self._waiting: list[list[str]] = [[] for _ in range(answers)]
        self._turn = 0
        self._last = "\n"
        self._plain = sys.stdout.isatty()  # a terminal obeys control characters; a file is given what there is

    def take(self, update: "Update") -> None:
        """Some tokens of an answer."""
        self.reasons[update.index] = update.finish_reason or ""
        if self._output.json:
            self._output.emit(
                "text",
                index=update.index,
                text=update.text,
                token_ids=update.token_ids,
                finish_reason=update.finish_reason,
            )
            return
        self._waiting[update.index].append(update.text)
        while self._turn < len(self._waiting):
            self._write(self._waiting[self._turn])
            self._waiting[self._turn] = []
            if not self.reasons[self._turn]:
                return
            self.end_line()
            self._turn += 1
            if self._turn < len(self._waiting):
                self._write("\n")

    def end_line(self) -> None:
        """The terminal's next line is somebody else's."""
        if self._last != "\n":
            self._write("\n")

    def _write(self, texts: Iterable[str]) -> None:
        text = "".join(texts)
        text = clean(text) if self._plain else text
        if text:
            self._last = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(generate)
