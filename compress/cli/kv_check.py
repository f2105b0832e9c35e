"""`compress kv check`: what codes would do to a model's keys and values, and what each layer should be kept as."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import Output, speak

if TYPE_CHECKING:
    from kv_compress._preflight import Kept
    from kv_compress._statistics import Layer

_CODECS = ("int8", "int4", "fp8")
_HUGE_BIAS = 100.0
_WIDE = 50.0


def check(
    model: Annotated[str, typer.Argument(help="Model: folder or hub id.", show_default=False)],
    text: Annotated[str, typer.Option("--text", help="Data set to look at: hub id, folder, file, or demo.")] = "demo",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows of text.")] = 8,
    length: Annotated[
        int, typer.Option("--length", min=2, help="Tokens of a row; at most what the model takes.")
    ] = 512,
    prefix: Annotated[str, typer.Option("--prefix", help="Text before each document.", show_default=False)] = "",
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Bits for a number (5.5), or bytes for a token (4KiB).", show_default=False),
    ] = None,
    max_increase: Annotated[
        str, typer.Option("--max-increase", help="Of perplexity: a choice that costs more is refused.")
    ] = "1%",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the stage of a recipe, .yaml.", show_default=False)
    ] = None,
    numerics: opt.Numerics = "fast",
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure what each codec does to keys and values, layer by layer.

    With --budget: choose each layer's precision, try it on the text, and write the stage of a recipe. Bytes are those
    that the runtime allocates, in its numerics on this device; --dtype is for measuring.
    """
    say = speak(json=json, quiet=quiet, verbose=verbose)
    most = _share(max_increase)
    _require_output(budget, output)
    opt.check_numerics(numerics)
    opt.check_dtype(dtype)
    from compress.core.calibration import load_tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.numerics import dtype_name, runtime_dtype
    from compress.core.places import locate
    from compress.core.recipe import Calibration
    from compress.core.walk import compute_dtype
    from kv_compress import _preflight, _statistics

    checkpoint = Checkpoint.open(opt.model_name(model), offline=offline)
    limit = checkpoint.config.get("max_position_embeddings")
    fits = min(length, limit) if isinstance(limit, int) else length
    asked = Calibration(dataset=locate(text, "calibration", Path.cwd()), samples=samples, length=fits, prefix=prefix)
    tokens = load_tokens(asked, checkpoint, Path.cwd(), offline=offline)
    place = opt.choose_device(device)
    network = checkpoint.build_model(compute_dtype(checkpoint, dtype, place), place)
    layers = _statistics.measure(network, tokens)
    biases = _statistics.key_bias_norms(checkpoint.tensors, checkpoint.tensor)
    held = runtime_dtype(numerics, place)

    def tried(name: str, kept: "Sequence[Kept]") -> dict[str, Any]:
        loss = _statistics.losses(network, tokens, _preflight.policy_of(kept, layers))
        bytes_ = _preflight.token_bytes(kept, layers, held.itemsize)
        bits = 8 * bytes_ / _preflight.numbers(layers)
        found = {"name": name, "bytes_per_token": bytes_, "bits_per_number": bits, "perplexity": math.exp(loss)}
        return found | {"increase": math.expm1(loss - plain)}

    plain = _statistics.losses(network, tokens, None)
    kept = None
    if budget is not None:
        kept = _preflight.choose(layers, _preflight.budget_bytes(budget, layers), held.itemsize)
    rows = [tried(codec, _preflight.uniform(codec, layers)) for codec in ("full", *_CODECS)]
    rows += [tried("chosen", kept)] if kept else []
    _show(say, layers, biases, kept, rows, dtype_name(held))
    stage = None
    if kept is not None:
        _require_good(rows[-1], most, layers, kept)
        stage = _preflight.fragment(kept)
        say.answer(_written(stage, output))
    say.finish("kv check", full_dtype=dtype_name(held), layers=_plain(layers, biases, kept), tried=rows, stage=stage)


def _share(text: str) -> float:
    from compress.core.errors import UsageError
    from compress.core.quantities import parse_fraction

    try:
        return parse_fraction(text)
    except ValueError as error:
        raise UsageError(f"--max-increase {error}") from None


def _require_output(budget: str | None, output: Path | None) -> None:
    from compress.core.errors import UsageError

    if output is None:
        return
    if budget is None:
        raise UsageError("--output needs a decision to write", hint="give --budget, for example 5.5")
    if output.suffix not in (".yaml", ".yml") or output.exists() or not output.absolute().parent.is_dir():
        raise UsageError("is no new .yaml file in a folder that is there", where=str(output))


def _require_good(chosen: dict[str, Any], most: float, layers: "Sequence[Layer]", kept: "Sequence[Kept]") -> None:
    """InputError for a choice that costs too much, with the layer that it costs most in."""
    from compress.core.errors import InputError

    if chosen["increase"] <= most:
        return
    worst = max(range(len(layers)), key=lambda index: kept[index].error(layers[index]))
    error, rise = 100 * math.sqrt(kept[worst].error(layers[worst])), 100 * chosen["increase"]
    raise InputError(
        f"no precisions of {chosen['bits_per_number']:.3g} bits are good enough: perplexity rises by {rise:.3g} %, "
        f"more than {100 * most:.3g} %; most is lost in layer {worst} ({kept[worst].words}, off by {error:.3g} %)",
        hint="give a larger --budget",
    )


def _show(
    say: Output,
    layers: "Sequence[Layer]",
    biases: dict[int, float],
    kept: "Sequence[Kept] | None",
    rows: list[Any],
    dtype: str,
) -> None:
    from compress.cli.tables import add_row, grid
    from compress.cli.words import NOTHING, figure

    columns = ["layer", "key bias", "widest key", "sinks", *_CODECS, "int4 turned", "kept as" if kept else ""]
    table = grid(*columns, title="error of attention's output, in percent, under each codec")
    for index, layer in enumerate(layers):
        errors = [_percent(layer, codec, turned) for codec, turned in [*((c, False) for c in _CODECS), ("int4", True)]]
        bias = figure(biases[index]) if index in biases else NOTHING
        sinks = f"{100 * layer.sink_share:.0f} %"
        add_row(table, index, bias, f"{layer.key_spread:.1f} x", sinks, *errors, kept[index].words if kept else "")
    say.show(table)
    table = grid("all layers", "bytes a token", "bits a number", "perplexity", "change")
    for row in rows:
        bits, perplexity = f"{row['bits_per_number']:.2f}", figure(row["perplexity"])
        name = f"full, in {dtype}" if row["name"] == "full" else row["name"]
        add_row(table, name, f"{row['bytes_per_token']:,}", bits, perplexity, f"{100 * row['increase']:+.2f} %")
    say.show(table)
    for index, layer in enumerate(layers):
        if biases.get(index, 0.0) > _HUGE_BIAS or layer.key_spread > _WIDE:
            say.tell(
                f"layer {index}: its keys reach {layer.key_spread:.0f} times as far in one channel as in most; whole "
                "numbers of few bits lose the others",
                style="yellow",
            )


def _percent(layer: "Layer", codec: str, turned: bool) -> str:
    """Keys and values both: the root of the share of energy."""
    from compress.cli.words import NOTHING, figure

    if (codec, turned) not in layer.key_errors:
        return NOTHING
    return figure(100 * math.sqrt(layer.key_errors[codec, turned] + layer.value_errors[codec, turned]))


def _written(stage: dict[str, Any], output: Path | None) -> str:
    """The stage as YAML, in the file that was asked for or as it is printed."""
    from compress.core.files import atomic_write
    from compress.report.data import as_yaml

    text = as_yaml([stage])
    if output is None:
        return text.rstrip()
    atomic_write(output, "# A stage for a recipe's stages, chosen by compress kv check.\n" + text)
    return str(output)


def _plain(layers: "Sequence[Layer]", biases: dict[int, float], kept: "Sequence[Kept] | None") -> list[dict[str, Any]]:
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
            "kept": None if kept is None else kept[index].words,
        }
        for index, layer in enumerate(layers)
    ]


def register(group: typer.Typer) -> None:
    """Add the command of this file to the group kv."""
    group.command()(check)
