"""Long contexts: facts that a model has to find again far back, and perplexity over long text, through the runtime.

Answers are generated greedily by the engine that serves, whatever it does with its keys and values, original and
artifact on the same texts. A question counts as right where the answer's number comes first and nothing is added to it.
Shape suffixes: Q questions, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.core.calibration import Encoder
from compress.core.checkpoint import load_tokenizer
from compress.core.errors import UsageError
from compress.core.events import Finished, Listener, Progress, Started, silent
from compress.evaluate._haystack import Haystack, read_haystack
from compress.evaluate._recall import ROOM, Question, questions
from compress.evaluate.intervals import interval, ratio
from compress.evaluate.scorers import RuntimeScorer, Scorer

if TYPE_CHECKING:
    from compress.core.recipe import Evaluation
    from compress.core.recipe_sections import LongContext
    from runtime.completion import Completion
    from runtime.llm import LLM

MOST_TOLD = 40  # samples that went wrong, of all
_PIECE = 8  # prompts, or windows, between two signs of life


@dataclass(frozen=True)
class Answer:
    """What a model made of a question: `exact` where the right tokens came one by one."""

    right: bool
    exact: bool
    tokens: int
    text: str


def measure_long_context(
    original: Scorer | None,
    artifact: Scorer,
    evaluation: Evaluation,
    *,
    base_folder: Path | str | None = None,
    offline: bool = False,
    events: Listener = silent,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(figures, protocol, notices). Figures: tasks {name: {length: accuracy of both, …}}, perplexity {length: of both},
    regressions [samples that the original had right and the artifact has wrong]. Without `original`, the artifact's."""
    asked = evaluation.long_context
    if asked is None:
        raise UsageError("the evaluation asks for no long contexts")
    haystack = read_haystack(asked, base_folder, offline=offline, seed=evaluation.seed)
    encode = _encoder(artifact, asked)
    found = questions(asked, haystack, encode, evaluation.seed)
    windows = _windows(asked, haystack, encode)
    sides = [
        scorer and _side(scorer, label, asked, found, windows, events)
        for scorer, label in ((original, "original"), (artifact, "artifact"))
    ]
    figures = {
        "tasks": _task_figures(asked, found, sides, evaluation.seed),
        "perplexity": _perplexity(windows, sides, evaluation.seed),
        "regressions": _regressions(found, sides)[:MOST_TOLD],
    }
    return figures, _protocol(asked, haystack, found, windows), _notices(asked, haystack, sides)


@dataclass(frozen=True)
class _Side:
    """One model: its answers, and by length the negative log-likelihood of each window."""

    answers: list[Answer]
    losses: dict[int, np.ndarray]


def _side(
    scorer: Scorer,
    label: str,
    asked: LongContext,
    found: Sequence[Question],
    windows: dict[int, list[list[int]]],
    events: Listener,
) -> _Side:
    if not isinstance(scorer, RuntimeScorer):
        raise UsageError("long contexts are measured through the runtime", where="evaluate.long_context")
    encode = _encoder(scorer, asked)
    rows = [question.ids(encode) for question in found]
    longest = max([len(prompt) + len(answer) + ROOM for prompt, answer in rows] + [*windows])
    stage = f"evaluate long contexts, {label}"
    total = len(rows) + sum(map(len, windows.values()))
    events(Started(stage, total, "prompt"))
    with scorer.llm(longest) as llm:
        answers: list[Answer] = []
        for start in range(0, len(rows), _PIECE):
            piece = rows[start : start + _PIECE]
            answers += _answered(llm, encode, found[start : start + _PIECE], piece)
            events(Progress(stage, len(answers), total))
        losses, done = {}, len(answers)
        for length, lines in windows.items():
            losses[length] = np.array([_loss(llm, line) for line in lines])
            done += len(lines)
            events(Progress(stage, done, total))
    events(Finished(stage, f"{sum(answer.right for answer in answers)} of {len(answers)} right"))
    return _Side(answers, losses)


def _answered(
    llm: LLM, encode: Encoder, found: Sequence[Question], rows: Sequence[tuple[list[int], list[int]]]
) -> list[Answer]:
    from runtime.params import SamplingParams

    params = [SamplingParams(max_tokens=len(answer) + ROOM, temperature=0.0, stop=("\n",)) for _, answer in rows]
    completions = llm.generate([prompt for prompt, _ in rows], params)
    return [
        judged(completion, question.answer, answer)
        for completion, question, (_, answer) in zip(completions, found, rows, strict=True)
    ]


def judged(completion: Completion, answer: str, answer_ids: Sequence[int]) -> Answer:
    """Right is an answer that comes first and is not the beginning of something longer."""
    text = completion.text.strip()
    behind = text.removeprefix(answer)
    right = text.startswith(answer) and not behind[:1].isalnum()
    exact = completion.token_ids[: len(answer_ids)] == tuple(answer_ids)
    return Answer(right, exact, len(completion.token_ids), text)


def _loss(llm: LLM, line: list[int]) -> float:
    """The negative log-likelihood of a window's tokens behind its first."""
    [completion] = llm.generate([line], max_tokens=0, prompt_logprobs=0, temperature=0.0)
    return -sum(token.logprob for token in completion.prompt_logprobs or () if token is not None)


def _encoder(scorer: Scorer, asked: LongContext) -> Encoder:
    return Encoder(load_tokenizer(scorer.folder), asked.special_tokens, asked.prefix)


def _windows(asked: LongContext, haystack: Haystack, encode: Encoder) -> dict[int, list[list[int]]]:
    """Rows of each length from the beginning of the data set's text, as many as there are samples and text for."""
    if not asked.perplexity or haystack.text is None:
        return {}
    most = max(asked.lengths) * asked.samples
    ids = encode(haystack.text[: 16 * most])[:most]
    rows = {length: [ids[at : at + length] for at in range(0, len(ids), length)] for length in asked.lengths}
    full = {length: [row for row in lines if len(row) == length][: asked.samples] for length, lines in rows.items()}
    return {length: lines for length, lines in full.items() if lines}


def _task_figures(
    asked: LongContext, found: Sequence[Question], sides: Sequence[_Side | None], seed: int
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for task in asked.tasks:
        for length in asked.lengths:
            mine = [
                number for number, question in enumerate(found) if (question.task, question.length) == (task, length)
            ]
            figures.setdefault(task, {})[str(length)] = _cell(mine, sides, seed)
    return figures


def _cell(mine: Sequence[int], sides: Sequence[_Side | None], seed: int) -> dict[str, Any]:
    """The figures of one task at one length."""
    count = len(mine)
    right, exact, tokens = (
        [side and np.array([getattr(side.answers[number], name) for number in mine], float) for side in sides]
        for name in ("right", "exact", "tokens")
    )
    before_Q, after_Q = right
    pair = None
    if before_Q is not None and after_Q is not None:
        pair = interval(ratio(after_Q - before_Q, np.ones(count)), count, seed=seed)
    means = [None if values is None else float(values.mean()) for values in right]
    return {
        "original": means[0],
        "artifact": means[1],
        "difference": None if None in means else float(after_Q.mean() - before_Q.mean()),
        "interval": pair,
        "n": count,
        "regressed": None if before_Q is None else int((before_Q > after_Q).sum()),
        "gained": None if before_Q is None else int((before_Q < after_Q).sum()),
        "exact_tokens": _pair(exact),
        "output_tokens": _pair(tokens),
    }


def _pair(sides: Sequence[np.ndarray | None]) -> dict[str, float | None]:
    return {
        name: None if values is None else float(values.mean())
        for name, values in zip(("original", "artifact"), sides, strict=True)
    }


def _perplexity(windows: dict[int, list[list[int]]], sides: Sequence[_Side | None], seed: int) -> dict[str, Any]:
    figures = {}
    for length, lines in windows.items():
        tokens_W = np.full(len(lines), length - 1.0)
        before_W, after_W = (None if side is None else side.losses[length] for side in sides)
        increase = pair = None
        if before_W is not None and after_W is not None:
            moved = ratio(after_W - before_W, tokens_W)
            increase = float(np.expm1(moved(np.ones((1, len(lines))))[0]))
            pair = interval(lambda drawn, moved=moved: np.expm1(moved(drawn)), len(lines), seed=seed)
        means = [None if loss is None else float(np.exp(loss.sum() / tokens_W.sum())) for loss in (before_W, after_W)]
        figures[str(length)] = {
            "original": means[0], "artifact": means[1], "increase": increase, "interval": pair, "n": len(lines),
        }  # fmt: skip
    return figures


def _regressions(found: Sequence[Question], sides: Sequence[_Side | None]) -> list[dict[str, Any]]:
    before, after = sides
    if before is None or after is None:
        return []
    return [
        {
            "task": question.task, "length": question.length, "sample": question.number, "depth": question.depth,
            "answer": question.answer, "original": was.text, "artifact": now.text,
        }
        for question, was, now in zip(found, before.answers, after.answers, strict=True)
        if was.right and not now.right
    ]  # fmt: skip


def _protocol(
    asked: LongContext, haystack: Haystack, found: Sequence[Question], windows: dict[int, list[list[int]]]
) -> dict[str, Any]:
    import hashlib

    texts = hashlib.sha256("\0".join(f"{question.text}\0{question.answer}" for question in found).encode())
    return {
        "text": None if asked.dataset is None else Path(asked.dataset).name,
        "sentences": len(haystack.sentences),
        "samples": asked.samples,
        "special_tokens": asked.special_tokens,
        "prefix": asked.prefix,
        "questions": len(found),
        "question_sha256": texts.hexdigest(),
        "windows": {str(length): len(lines) for length, lines in windows.items()},
    }


def _notices(asked: LongContext, haystack: Haystack, sides: Sequence[_Side | None]) -> list[str]:
    notices = []
    original, artifact = sides
    reference = original or artifact
    if reference is not None and not any(answer.right for answer in reference.answers):
        whose = "the original" if original is not None else "the model"
        notices.append(f"{whose} has no answer right in long contexts: that it stays so says nothing")
    if asked.perplexity and haystack.text is None:
        notices.append("perplexity over long text was not measured: evaluate.long_context.dataset names no text")
    return notices
