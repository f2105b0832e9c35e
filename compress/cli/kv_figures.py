"""What `compress kv check` found, as tables and as plain data."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.cli.console import Output

if TYPE_CHECKING:
    from kv_compress._kept import Kept
    from kv_compress._statistics import Layer
    from kv_compress._trial import Tried

_CODECS = ("int8", "int4", "fp8")
_HUGE_BIAS = 100.0
_WIDE = 50.0


def show(
    say: Output,
    layers: "Sequence[Layer]",
    biases: dict[int, float],
    kept: "Sequence[Kept] | None",
    rows: "Sequence[Tried]",
    dtype: str,
) -> None:
    """Tables of layers and of what was tried, and a word on keys that few bits do not suit."""
    from compress.cli.tables import add_row, grid
    from compress.cli.words import NOTHING, figure
    from kv_compress._coded_pages import RECENT, SINKS

    columns = ["layer", "key bias", "widest key", "sinks", *_CODECS, "int4 rot", "int4 chan"]
    columns.append("kept as" if kept else "")
    table = grid(*columns, title="error of attention's output, in percent, under each codec")
    for index, layer in enumerate(layers):
        errors = [_percent(layer, codec, turned) for codec, turned in [*((c, False) for c in _CODECS), ("int4", True)]]
        errors.append(_percent_paged(layer))
        bias = figure(biases[index]) if index in biases else NOTHING
        sinks = f"{100 * layer.sink_share:.0f} %"
        words = kept[index].words.partition(", keys")[0] if kept else ""
        add_row(table, index, bias, f"{layer.key_spread:.1f}x", sinks, *errors, words)
    say.show(table)
    table = grid("all layers", "bytes a token", "bits a number", "perplexity", "change")
    for row in rows:
        bits, perplexity = f"{row.bits_per_number:.2f}", figure(row.perplexity)
        name = f"full, in {dtype}" if row.name == "full" else row.name
        add_row(table, name, f"{row.bytes_per_token:,}", bits, perplexity, f"{100 * row.increase:+.2f} %")
    say.show(table)
    if kept and kept[0].paged:
        say.show(f"kept in pages: int8 and int4 keys per channel; the first {SINKS}, latest {RECENT} tokens in full")
    for index, layer in enumerate(layers):
        if biases.get(index, 0.0) > _HUGE_BIAS or layer.key_spread > _WIDE:
            say.tell(
                f"layer {index}: its keys reach {layer.key_spread:.0f} times as far in one channel as in most; whole "
                "numbers of few bits lose the others",
                style="yellow",
            )


def plain(layers: "Sequence[Layer]", biases: dict[int, float], kept: "Sequence[Kept] | None") -> list[dict[str, Any]]:
    """Layers as plain data."""

    def errors(found: dict[tuple[str, bool], float]) -> dict[str, float]:
        return {f"{codec}, rotated" if turned else codec: error for (codec, turned), error in sorted(found.items())}

    return [
        {
            "layer": index,
            "key_bias_norm": biases.get(index),
            "largest_key": layer.largest_key,
            "key_spread": layer.key_spread,
            "sink_share": layer.sink_share,
            "key_errors": errors(layer.key_errors),
            "value_errors": errors(layer.value_errors),
            "paged_key_errors": dict(sorted(layer.paged_key_errors.items())),
            "paged_value_errors": dict(sorted(layer.paged_value_errors.items())),
            "kept": None if kept is None else kept[index].words,
        }
        for index, layer in enumerate(layers)
    ]


def _percent(layer: "Layer", codec: str, turned: bool) -> str:
    """Keys and values both: the root of the share of energy."""
    from compress.cli.words import NOTHING

    if (codec, turned) not in layer.key_errors:
        return NOTHING
    return _figure(100 * math.sqrt(layer.key_errors[codec, turned] + layer.value_errors[codec, turned]))


def _percent_paged(layer: "Layer") -> str:
    """Likewise of int4, where whole pages are coded, keys per channel."""
    from compress.cli.words import NOTHING

    if "int4" not in layer.paged_key_errors:
        return NOTHING
    return _figure(100 * math.sqrt(layer.paged_key_errors["int4"] + layer.paged_value_errors["int4"]))


def _figure(percent: float) -> str:
    """Three digits: there are many columns."""
    return f"{percent:.3g}"
