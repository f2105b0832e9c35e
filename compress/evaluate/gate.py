"""Gate: does what was measured keep the bounds that the recipe sets? A bound without its figure fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.core.quantities import format_bytes

if TYPE_CHECKING:
    from compress.core.recipe import Gate

ACCURACIES = ("acc_norm", "acc", "exact_match", "f1")


def check_gate(gate: Gate | None, evaluation: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> list[str]:
    """One sentence for each bound that is missed; an empty list means that the gate is passed.

    `evaluation` is the result of `evaluate` (None: nothing was measured); `sizes` holds {"bytes": of the artifact}.
    """
    if gate is None:
        return []
    measured = evaluation or {}
    perplexity = measured.get("perplexity") or {}
    failures = [
        _above("perplexity rose by", perplexity.get("increase"), gate.max_perplexity_increase, _percent),
        _above("perplexity is", perplexity.get("artifact"), gate.max_perplexity, _plain),
        _above("KL divergence is", (measured.get("kl") or {}).get("mean"), gate.max_kl, _plain),
        _above("the share of flips is", (measured.get("flips") or {}).get("share"), gate.max_flip_rate, _percent),
        _above("the share of changed refusals is", _changed_refusals(measured), gate.max_refusal_change, _percent),
        _above("the artifact takes", sizes.get("bytes"), gate.max_size, format_bytes),
    ]
    failures += _forgotten(gate.max_recall_drop, (measured.get("long_context") or {}).get("tasks") or {})
    tasks = measured.get("tasks") or {}
    failures += [_too_inaccurate(name, bound, tasks.get(name)) for name, bound in gate.min_accuracy.items()]
    if gate.max_accuracy_drop is not None:
        failures += [_dropped(name, gate.max_accuracy_drop, task) for name, task in tasks.items()]
        if not tasks:
            failures.append("no task was measured, but the gate bounds the drop of accuracy")
    return [failure for failure in failures if failure]


def accuracy(task: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The accuracy figures of a task: its first of acc_norm, acc, exact_match, f1; None if it has none."""
    return next((task[metric] for metric in ACCURACIES if task and metric in task), None)


def _changed_refusals(measured: Mapping[str, Any]) -> float | None:
    changed = (measured.get("refusals") or {}).get("changed")
    return changed["share"] if changed else None


def _above(what: str, value: float | None, bound: float | None, text: Any) -> str:
    if bound is None:
        return ""
    if value is None:
        return f"{what} an unknown figure (not measured or not finite), but the gate allows at most {text(bound)}"
    return f"{what} {text(value)}, more than the {text(bound)} that the gate allows" if value > bound else ""


def _too_inaccurate(name: str, bound: float, task: Mapping[str, Any] | None) -> str:
    figures = accuracy(task)
    if figures is None or figures["artifact"] is None:
        return f"the accuracy of {name} was not measured, but the gate asks for at least {_percent(bound)}"
    if figures["artifact"] >= bound:
        return ""
    return (
        f"the accuracy of {name} is {_percent(figures['artifact'])}, less than the {_percent(bound)} that the gate asks"
    )


def _dropped(name: str, bound: float, task: Mapping[str, Any]) -> str:
    figures = accuracy(task)
    if figures is None:
        return ""
    if figures["difference"] is None:
        return f"the drop of accuracy on {name} was not measured, but the gate allows at most {_percent(bound)}"
    if -figures["difference"] <= bound:
        return ""
    return f"the accuracy of {name} fell by {_percent(-figures['difference'])}, more than the {_percent(bound)} allowed"


def _forgotten(bound: float | None, tasks: Mapping[str, Any]) -> list[str]:
    """Long contexts of which fewer questions are answered than the bound allows."""
    if bound is None:
        return []
    cells = [(f"{task} in {int(length):,} tokens", cell) for task in tasks for length, cell in tasks[task].items()]
    if not cells or any(cell["difference"] is None for _, cell in cells):
        return [f"the drop of right answers in long contexts was not measured, but the gate allows {_percent(bound)}"]
    return [
        f"right answers of {name} fell by {_percent(-cell['difference'])}, more than the {_percent(bound)} allowed"
        for name, cell in cells
        if -cell["difference"] > bound
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _plain(value: float) -> str:
    return f"{value:.4g}"
