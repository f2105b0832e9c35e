"""Quality against the bytes that keys and values really take, for each method of eviction, a half to an eighth kept.

    python benchmarks/kv_long_context.py --data DIR                               # all rows: minutes
    python benchmarks/kv_long_context.py --data DIR --methods adakv --add         # one method, into what --out holds
    python benchmarks/kv_long_context.py --data DIR --lengths 8192 --models --add # recall at one more length

Recall: questions of compress.evaluate.long_context (pass key, needle, one of four facts, a row of a table) in plain
filler, on the model of make_induction_model.py, which copies over any distance and has learned nothing. Evicted is at
the prompt's end, when the question is known ("end"), or at every 256 tokens of the prompt, too, when it is not
("within"). Counted: right answers, tokens of an answer, questions that only the whole cache has right; bytes of the
pages that a sequence holds behind its prompt (where counts are unequal, of the pieces of pages: what lies between is
free for other sequences), and the most of the pages that were ever owned, reading the prompt included. The model has
one head in each layer, so that adakv can share nothing out and is snapkv.

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
from collections.abc import Sequence
from pathlib import Path

import kv_long_context_plot
import kv_long_context_table
import tools
import torch
from kv_long_context_table import KEPT, WINDOW
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

METHODS = (
    "random", "snapkv", "pyramidkv", "adakv", "h2o", "keydiff", "streaming", "expected_attention", "tova", "key_norm"
)  # fmt: skip
WAYS = ("all", "cut", *METHODS)
WITHIN = ("prefill_chunk", "prefill_end", "decode")
EVERY = 32
TOKEN_BYTES = 5120  # of the copying model
FULL = {"method": "all", "when": "", "kept": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="*", default=["stories-7m", "tinystories-656k"], help="for perplexity")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096], help="of prompts, for recall")
    parser.add_argument("--methods", nargs="+", default=WAYS[1:], choices=WAYS[1:], help="beside the whole cache")
    parser.add_argument("--samples", type=int, default=4, help="questions of each task")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--within", type=float, nargs="*", default=[0.25], help="shares that are tried within prompts")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "kv-long-context.json")
    parser.add_argument("--add", action="store_true", help="to the rows that --out holds, in place of the same ones")
    parser.add_argument("--table", action="store_true", help="show what --out holds, and draw it; measure nothing")
    asked = parser.parse_args()
    if asked.table:
        results = json.loads(asked.out.read_text())
        print(kv_long_context_table.render(results))
        kv_long_context_plot.draw(results, asked.out.parent)
        return
    if asked.data is None:
        parser.error("--data is needed to measure")
    protocol = {
        "samples": asked.samples,
        "windows": asked.windows,
        "about": " ".join(__doc__.split("\n\n", 2)[2].split()),
    }
    before = json.loads(asked.out.read_text()) if asked.add else {"protocol": protocol, "recall": [], "perplexity": []}
    if before["protocol"] != protocol:
        parser.error(f"{asked.out} holds rows of another protocol: measure all of them anew, without --add")
    environment = tools.describe_machine() | {"load_before": os.getloadavg()[0]}
    results = {"environment": environment, **{name: before[name] for name in ("protocol", "recall", "perplexity")}}

    def keep(kind: str, found: dict) -> None:
        results[kind] = placed(results[kind], found)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        print(kind, {name: value for name, value in found.items() if name != "regressed"}, flush=True)

    for model in asked.models:
        perplexity(asked, asked.data / "models" / model, keep)
    for length in asked.lengths:
        recall(asked, length, keep)


def placed(rows: list[dict], found: dict) -> list[dict]:
    """The rows with one more, or in place of the same way to keep, in the order of tables."""

    def order(row: dict) -> tuple:
        return row.get("length", 0), row.get("model", ""), WAYS.index(row["method"]), row["when"], -row["kept"]

    return sorted([row for row in rows if order(row) != order(found)] + [found], key=order)


def ways(asked: argparse.Namespace, times: dict[str, Sequence[float]]) -> list[dict]:
    """Ways to keep, the whole cache first; `times`: when methods evict, and the shares that are tried then."""
    found = [FULL]
    for method in asked.methods:
        tried = {"": KEPT} if method == "cut" else times
        found += [{"method": method, "when": when, "kept": kept} for when, shares in tried.items() for kept in shares]
    return found


def recall(asked: argparse.Namespace, length: int, keep) -> None:
    """Right answers of every way to keep."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, heads=1, kv_heads=1, context_tokens=2 * length)  # every head would do the same
        encode = Encoder(load_tokenizer(folder))
        wanted = questions(LongContext(lengths=(length,), samples=asked.samples), filler(0), encode, 0)
        rows = [(question, *question.ids(encode)) for question in wanted]
        right: set[int] = set()
        for way in ways(asked, {"end": KEPT, "within": asked.within}):
            found, answers = asked_all(folder, way, rows)
            mine = {number for number, answer in enumerate(answers) if answer.right}
            right = right or mine
            lost = [f"{wanted[number].task} at {wanted[number].depth:g}" for number in sorted(right - mine)]
            figures = {"right": len(mine), "questions": len(rows), "regressed": lost}
            keep("recall", {"length": length} | way | found | figures)


def asked_all(folder: Path, way: dict, rows: list) -> tuple[dict, list]:
    """The answers, and bytes: held behind the prompt and at most, means of all questions."""
    eviction = None
    if way["when"]:
        when = ("prefill_end", "decode") if way["when"] == "end" else WITHIN
        eviction = EvictionSettings(method=way["method"], budget=Budget(ratio=way["kept"]), every=256, when=when)
    llm = LLM(
        folder, dtype=torch.float32, device="cpu", max_sequences=1, prefix_cache=False,
        kv_bytes=3 * TOKEN_BYTES * max(len(prompt) for _, prompt, _ in rows), token_budget=4096, eviction=eviction,
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
            behind = behind or (held_bytes(llm) if updates else 0)
            for update in updates:
                tokens += update.token_ids
                text += update.text
        answers.append(judged(Completion(text, tuple(tokens), "stop"), question.answer, answer))
        held.append(behind)
        most.append(max(during))
    return {
        "bytes": round(sum(held) / len(held)),
        "peak_bytes": round(sum(most) / len(most)),
        "output_tokens": sum(answer.tokens for answer in answers) / len(answers),
    }, answers


def held_bytes(llm: LLM) -> int:
    """Of the pages that sequences hold, less the pieces of them that are free for any other sequence."""
    pool = llm.engine.scheduler.pool
    free = 0.0 if pool.groups is None else pool.groups.subpages.free / pool.groups.columns
    return round(pool.page.bytes * (pool.statistics.owned - free))


def watched(llm: LLM) -> list[int]:
    """Bytes of the pages that are owned while each step is computed, from now on: before what it evicts is given
    back."""
    runner, owned = llm.engine.runner, []
    run = runner.run

    def watched_run(step, wanted):
        owned.append(llm.stats().pages.owned * llm.engine.scheduler.pool.page.bytes)
        return run(step, wanted)

    runner.run = watched_run
    return owned


def perplexity(asked: argparse.Namespace, folder: Path, keep) -> None:
    """Of windows of a text, token by token given what stayed of those before it."""
    tokenizer, text = load_tokenizer(folder), asked.data / "text" / "tinystories-b.txt"
    windows = []
    for story in text.read_text(encoding="utf-8").split("<|endoftext|>"):
        if len(windows) < asked.windows and len(story) > 3 * WINDOW:  # characters: fewer are never so many tokens
            ids = tokenizer("<|start_story|>" + story.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            windows += [ids[:WINDOW]] if len(ids) >= WINDOW else []
    for way in ways(asked, {"within": KEPT}):
        slots, eviction = round(way["kept"] * WINDOW), None
        if way["when"]:
            eviction = EvictionSettings(method=way["method"], budget=Budget(tokens=slots), every=EVERY, when=WITHIN)
        llm = LLM(folder, dtype=torch.float32, device="cpu", max_sequences=1, prefix_cache=False, eviction=eviction)
        lines = [line[at : at + slots] for line in windows for at in range(0, WINDOW, slots)]
        during = watched(llm)
        read = [read_line(llm, line, during) for line in (lines if way["method"] == "cut" else windows)]
        logprobs = [logprob for found, *_ in read for logprob in found]
        held = {"bytes": max(line[1] for line in read), "peak_bytes": max(line[2] for line in read)}
        found = {"tokens": len(logprobs), "perplexity": math.exp(-sum(logprobs) / len(logprobs))}
        keep("perplexity", {"model": folder.name} | way | held | found)


def read_line(llm: LLM, line: list[int], during: list[int]) -> tuple[list[float], int, int]:
    """Log-probabilities of a text's tokens, the bytes that it holds when it is read, and the most until then."""
    llm.add(line, SamplingParams(max_tokens=2, prompt_logprobs=0, temperature=0.0, ignore_eos=True))
    found, held, most = [], 0, 0
    during.clear()
    while llm.has_work:
        for update in llm.step():
            found += [token.logprob for token in update.prompt_logprobs or () if token is not None]
            if not held:
                held, most = held_bytes(llm), max(during)
    return found, held, most


if __name__ == "__main__":
    main()
