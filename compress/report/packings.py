"""Packings: what the runtime made of layers with zeros, put together by what became of them and told in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.layers.sparse import Packing

_MOST_NAMES = 2
_FORMS = {"2:4": "as 2:4 on sparse tensor cores", "bitmap": "as a bitmap and the weights that are left"}


def by_outcome(packings: Mapping[str, Packing]) -> list[dict[str, Any]]:
    """Names of layers under each outcome: how they are held ("" dense) and why. Shares of zeros are means, and times of
    packed : dense layers medians, by rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, packing in packings.items():
        found.setdefault((packing.form, packing.reason), []).append(name)
    return [
        {
            "form": form,
            "reason": reason,
            "zeros": fmean(packings[name].zeros for name in names),
            "against_dense": _ratios([packings[name].against_dense for name in names]),
            "layers": names,
        }
        for (form, reason), names in found.items()
    ]


def _ratios(each: Sequence[Mapping[int, float]]) -> dict[str, float]:
    rows = sorted({count for ratios in each for count in ratios})
    return {str(count): median(ratios[count] for ratios in each if count in ratios) for count in rows}


def sentence(outcome: Mapping[str, Any]) -> str:
    """How many layers ran how, which, and why."""
    names = outcome["layers"]
    one = len(names) == 1
    many = f"{len(names):,} layer{'' if one else 's'} with zeros ({outcome['zeros']:.0%} of {'it' if one else 'them'})"
    form = f"packed, {_FORMS.get(outcome['form'], outcome['form'])}" if outcome["form"] else "dense"
    named = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    times = ", ".join(f"{ratio:.2f} at {rows}" for rows, ratio in outcome["against_dense"].items())
    return f"{many} ran {form} ({named}): {outcome['reason']}" + (f"; packed : dense by rows: {times}" if times else "")


def run_notes(run: Mapping[str, Any]) -> list[str]:
    """How the zeros of a run's artifact were executed, where its speed was measured; nothing where it was not."""
    found = (run.get("speed") or {}).get("found") or ()
    told = [sentence(outcome) for each in found for outcome in each.get("packings") or ()]
    return list(dict.fromkeys(told))
