"""Quality against the bytes that keys and values really take, for each method of eviction, a half to an eighth kept.

    python benchmarks/kv_long_context.py --data DIR [--length 2048] [--samples 4] [--windows 8] [--out FILE]

Recall: questions of compress.evaluate.long_context (pass key, needle, one of four facts, a row of a table) in plain
filler, on the model of make_induction_model.py, which copies over any distance and has learned nothing. Evicted is at
the prompt's end, when the question is known ("end"), or at every 256 tokens of the prompt, too, when it is not
("within"). Counted: right answers, tokens of an answer, questions that only the whole cache has right; bytes of the
pages that a sequence holds behind its prompt, and the most that it ever held, reading the prompt included.

Perplexity: of a model of stories on the first 384 tokens of long stories, one at a time, since the model has seen no
two together; evicted at every 32 of them, to so many slots.

Beside them stand the whole cache, lots drawn at the same budget (random), and the whole cache in the same memory
("cut"): of a prompt as many of its last tokens, of a window pieces of so many tokens, each read by itself.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import kv_long_context_plot
import tools
import torch
from make_induction_model import make_model

from compress.core.calibration import Encoder
from compress.core.checkpoint import load_tokenizer
from compress.core.recipe_sections import LongContext
from compress.evaluate._haystack import filler
from compress.evaluate._recall import ROOM, questions
from compress.evaluate.long_context import judged
from kv_compress.eviction import Budget, EvictionSettings
from runtime.completion import Completion
from runtime.llm import LLM
from runtime.params import SamplingParams

METHODS = ("random", "snapkv", "h2o", "keydiff", "streaming", "expected_attention", "tova", "key_norm")
KEPT = (0.5, 0.25, 0.125)
WITHIN = ("prefill_chunk", "prefill_end", "decode")
WINDOW, EVERY = 384, 32
FULL = {"method": "all", "when": "", "kept": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["tinystories-656k"], help="for perplexity")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=4, help="questions of each task")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--within", type=float, nargs="*", default=[0.25], help="shares that are tried within prompts")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "kv-long-context.json")
    parser.add_argument("--only", choices=("recall", "perplexity"), help="leave the other part of --out as it is")
    parser.add_argument("--table", action="store_true", help="show what --out holds, and draw it; measure nothing")
    asked = parser.parse_args()
    if asked.table:
        results = json.loads(asked.out.read_text())
        print(render(results))
        kv_long_context_plot.draw(results, asked.out.parent)
        return
    if asked.data is None:
        parser.error("--data is needed to measure")
    protocol = {name: getattr(asked, name) for name in ("length", "samples", "windows", "models")}
    results = {
        "environment": tools.describe_machine() | {"load_before": os.getloadavg()[0]},
        "protocol": protocol | {"about": " ".join(__doc__.split("\n\n", 2)[2].split())},
        "recall": [],
        "perplexity": [],
    }
    if asked.only is not None:
        other = {"recall": "perplexity", "perplexity": "recall"}[asked.only]
        results[other] = json.loads(asked.out.read_text())[other]

    def keep(kind: str, found: dict) -> None:
        results[kind].append(found)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        print(kind, {name: value for name, value in found.items() if name != "regressed"}, flush=True)

    for model in asked.models if asked.only != "recall" else ():
        perplexity(asked.data / "models" / model, asked.data / "text" / "tinystories-b.txt", asked.windows, keep)
    if asked.only != "perplexity":
        recall(asked, keep)


def recall(asked: argparse.Namespace, keep) -> None:
    """Right answers of every way to keep."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, heads=1, kv_heads=1, context_tokens=2 * asked.length)  # every head would do the same
        encode = Encoder(load_tokenizer(folder))
        wanted = questions(LongContext(lengths=(asked.length,), samples=asked.samples), filler(0), encode, 0)
        rows = [(question, *question.ids(encode)) for question in wanted]
        right: set[int] = set()
        ways = [FULL] + [{"method": "cut", "when": "", "kept": kept} for kept in KEPT]
        for method in METHODS:
            ways += [{"method": method, "when": "end", "kept": kept} for kept in KEPT]
            ways += [{"method": method, "when": "within", "kept": kept} for kept in asked.within]
        for way in ways:
            found, answers = asked_all(folder, way, rows)
            mine = {number for number, answer in enumerate(answers) if answer.right}
            right = right or mine
            lost = [f"{wanted[number].task} at {wanted[number].depth:g}" for number in sorted(right - mine)]
            keep("recall", way | found | {"right": len(mine), "questions": len(rows), "regressed": lost})


def asked_all(folder: Path, way: dict, rows: list) -> tuple[dict, list]:
    """The answers, and bytes: held behind the prompt and at most, means of all questions."""
    eviction = None
    if way["when"]:
        when = ("prefill_end", "decode") if way["when"] == "end" else WITHIN
        eviction = EvictionSettings(method=way["method"], budget=Budget(ratio=way["kept"]), every=256, when=when)
    llm = LLM(
        folder, dtype=torch.float32, device="cpu", max_sequences=1, prefix_cache=False, kv_bytes="64MiB",
        token_budget=4096, eviction=eviction,
    )  # fmt: skip
    during = watched(llm)
    answers, held, most = [], [], []
    for question, prompt, answer in rows:
        ids = prompt[-round(way["kept"] * len(prompt)) :] if way["method"] == "cut" else prompt
        params = SamplingParams(max_tokens=len(answer) + ROOM, temperature=0.0, stop=("\n",))
        llm.add(ids, params)
        tokens, text, behind = [], "", 0
        during.clear()
        while llm.has_work:
            updates = llm.step()
            behind = behind or (llm.stats().pages.owned if updates else 0)
            for update in updates:
                tokens += update.token_ids
                text += update.text
        answers.append(judged(Completion(text, tuple(tokens), "stop"), question.answer, answer))
        held.append(behind)
        most.append(max(during))
    page = llm.engine.scheduler.pool.page.bytes
    return {
        "bytes": round(page * sum(held) / len(held)),
        "peak_bytes": round(page * sum(most) / len(most)),
        "output_tokens": sum(answer.tokens for answer in answers) / len(answers),
    }, answers


def watched(llm: LLM) -> list[int]:
    """The pages that are owned while each step is computed, from now on: before what it evicts is given back."""
    runner, owned = llm.engine.runner, []
    run = runner.run

    def watched_run(step, wanted):
        owned.append(llm.stats().pages.owned)
        return run(step, wanted)

    runner.run = watched_run
    return owned


def perplexity(folder: Path, text: Path, count: int, keep) -> None:
    """Of windows of a text, token by token given what stayed of those before it."""
    tokenizer = load_tokenizer(folder)
    windows = []
    for story in text.read_text(encoding="utf-8").split("<|endoftext|>"):
        if len(windows) < count and len(story) > 3 * WINDOW:  # characters: fewer are never so many tokens
            ids = tokenizer("<|start_story|>" + story.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            windows += [ids[:WINDOW]] if len(ids) >= WINDOW else []
    ways = [FULL] + [{"method": method, "when": "within", "kept": kept} for method in METHODS for kept in KEPT]
    ways += [{"method": "cut", "when": "", "kept": kept} for kept in KEPT]
    for way in ways:
        slots, eviction = round(way["kept"] * WINDOW), None
        if way["when"]:
            eviction = EvictionSettings(method=way["method"], budget=Budget(tokens=slots), every=EVERY, when=WITHIN)
        llm = LLM(folder, dtype=torch.float32, device="cpu", max_sequences=1, prefix_cache=False, eviction=eviction)
        lines = [line[at : at + slots] for line in windows for at in range(0, WINDOW, slots)]
        during = watched(llm)
        read = [read_line(llm, line) for line in (lines if way["method"] == "cut" else windows)]
        logprobs = [logprob for found, _ in read for logprob in found]
        keep(
            "perplexity",
            {"model": folder.name} | way
            | {"bytes": max(held for _, held in read), "peak_bytes": llm.engine.scheduler.pool.page.bytes * max(during),
               "tokens": len(logprobs), "perplexity": math.exp(-sum(logprobs) / len(logprobs))},
        )  # fmt: skip


def read_line(llm: LLM, line: list[int]) -> tuple[list[float], int]:
    """Log-probabilities of a text's tokens, and bytes of the pages that it holds in the end."""
    llm.add(line, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0, ignore_eos=True))
    found = []
    while llm.has_work:
        for update in llm.step():
            found += [token.logprob for token in update.prompt_logprobs or () if token is not None]
    page, kept = llm.engine.scheduler.pool.page, llm.engine.scheduler.points
    slots = len(line) if kept is None else min(len(line), kept.kept(len(line)))
    return found, page.bytes * -(-slots // page.tokens)


def render(results: dict) -> str:
    """Two tables: right answers, and perplexity; a column for each share that is kept."""
    lines = [
        f"Right answers of {results['recall'][0]['questions']} ({results['protocol']['length']:,} tokens of prompt), "
        "in brackets those that only the whole cache has right; kB behind the prompt, and at most.",
        "",
        *table(results["recall"], lambda way: f"{way['right']} ({len(way['regressed'])})"),
    ]
    for model in dict.fromkeys(way["model"] for way in results["perplexity"]):
        ways = [way for way in results["perplexity"] if way["model"] == model]
        lines += ["", f"Perplexity, {model}, stories of {WINDOW} tokens.", ""]
        lines += table(ways, lambda way: f"{way['perplexity']:.2f}")
    return "\n".join(lines)


def table(ways: list[dict], shown) -> list[str]:
    """A row for each method and time."""
    rows = dict.fromkeys((way["when"], way["method"]) for way in ways)
    lines = ["| keeps | evicts | " + " | ".join(f"{100 * kept:g} %" for kept in (1.0, *KEPT)) + " |"]
    lines.append("|---|---|" + "--:|" * (1 + len(KEPT)))
    for when, method in sorted(rows, key=lambda row: row[0]):
        cells = []
        for kept in (1.0, *KEPT):
            way = next((way for way in ways if (way["when"], way["method"], way["kept"]) == (when, method, kept)), None)
            sizes = "" if way is None else f"; {way['bytes'] / 1e3:.0f}, {way['peak_bytes'] / 1e3:.0f} kB"
            cells.append("" if way is None else shown(way) + sizes)
        times = {"": "–", "end": "at the prompt's end", "within": "within the prompt"}
        lines.append(f"| {method} | {times[when]} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
