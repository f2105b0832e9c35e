"""`compress kv check`: what codes would do to a model's keys and values, and what each layer should be kept as."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import speak
from compress.cli.kv_figures import plain, show

if TYPE_CHECKING:
    from kv_compress._kept import Kept
    from kv_compress._statistics import Layer
    from kv_compress._trial import Trial, Tried


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
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens of a sequence. [default: the longest]", show_default=False),
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
    from kv_compress import _kept, _preflight, _statistics
    from kv_compress._ranges import head_sizes
    from kv_compress._trial import Trial

    checkpoint = Checkpoint.open(opt.model_name(model), offline=offline)
    limit = checkpoint.config.get("max_position_embeddings")
    fits = min(length, limit) if isinstance(limit, int) else length
    asked = Calibration(dataset=locate(text, "calibration", Path.cwd()), samples=samples, length=fits, prefix=prefix)
    tokens = load_tokens(asked, checkpoint, Path.cwd(), offline=offline)
    place = opt.choose_device(device)
    held, sizes = runtime_dtype(numerics, place), head_sizes(checkpoint)
    points = _kept.usual_points(sizes, held.itemsize)
    longest = tokens.ids.shape[1] if tokens.lengths is None else int(max(tokens.lengths))
    paged = points is not None and _statistics.finds_pages(longest, points)
    if points is not None and not paged:
        say.tell(f"keys per channel: a row must have more than {points.position(1) + 1} tokens to tell", style="yellow")
    context = context or (limit if isinstance(limit, int) else fits)
    if budget is not None:
        shapes = _statistics.unmeasured(sizes)
        most_bytes = _preflight.budget_bytes(budget, shapes)
        _preflight.require_had(most_bytes, shapes, held.itemsize, context, paged=paged)
    network = checkpoint.build_model(compute_dtype(checkpoint, dtype, place), place)
    layers = _statistics.measure(network, tokens, points)
    biases = _statistics.key_bias_norms(checkpoint.tensors, checkpoint.tensor)
    proposals: list[list[Kept]] = []
    if budget is not None:
        proposals = _preflight.propose(layers, _preflight.budget_bytes(budget, layers), held.itemsize, context)
    trial = Trial(network, tokens, layers, held.itemsize, context)
    rows = [trial(codec, _kept.uniform(codec, layers)) for codec in ("full", *_statistics.codecs(layers[0].width))]
    if paged:
        rows += _per_channel(trial, layers)
    tried = [trial(f"not chosen: {_way(each)}", each) for each in proposals]
    best = _best(tried, most)
    kept = None if best is None else proposals[tried.index(best)]
    rows += [replace(each, name="chosen") if each is best else each for each in tried]
    show(say, layers, biases, kept, rows, dtype_name(held))
    stage = None
    if best is not None and kept is not None:
        _require_good(best, most, layers, kept)
        stage = _kept.fragment(kept)
        say.answer(_written(stage, output))
    say.finish(
        "kv check",
        full_dtype=dtype_name(held),
        layers=plain(layers, biases, kept),
        tried=[asdict(row) for row in rows],
        stage=stage,
    )


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


def _per_channel(trial: "Trial", layers: "Sequence[Layer]") -> "list[Tried]":
    """Keys per channel in all layers, for codecs whose pages hold more than in full."""
    from compress.core.errors import UsageError
    from kv_compress._kept import uniform
    from kv_compress.policy import PER_CHANNEL

    found = []
    for codec in PER_CHANNEL:
        with suppress(UsageError):
            found.append(trial(f"{codec}, keys per channel", uniform(codec, layers, paged=True)))
    return found


def _best(tried: "Sequence[Tried]", most: float) -> "Tried | None":
    """The first that is good enough, or else the one that costs least."""
    good = [each for each in tried if each.increase <= most]
    return next(iter(good), min(tried, key=lambda each: each.increase, default=None))


def _way(kept: "Sequence[Kept]") -> str:
    return "keys per channel" if any(each.paged for each in kept) else "keys per token"


def _require_good(chosen: "Tried", most: float, layers: "Sequence[Layer]", kept: "Sequence[Kept]") -> None:
    """InputError for a choice that costs too much, with the layer that it costs most in."""
    from compress.core.errors import InputError

    if chosen.increase <= most:
        return
    worst = max(range(len(layers)), key=lambda index: kept[index].error(layers[index]))
    error, rise = 100 * math.sqrt(kept[worst].error(layers[worst])), 100 * chosen.increase
    raise InputError(
        f"no precisions of {chosen.bits_per_number:.3g} bits are good enough: perplexity rises by {rise:.3g} %, "
        f"more than {100 * most:.3g} %; most is lost in layer {worst} ({kept[worst].words}, off by {error:.3g} %)",
        hint="give a larger --budget",
    )


def _written(stage: dict[str, Any], output: Path | None) -> str:
    """The stage as YAML, in the file that was asked for or as it is printed."""
    from compress.core.files import atomic_write
    from compress.report.data import as_yaml

    text = as_yaml([stage])
    if output is None:
        return text.rstrip()
    atomic_write(output, "# A stage for a recipe's stages, chosen by compress kv check.\n" + text)
    return str(output)


def register(group: typer.Typer) -> None:
    """Add the command of this file to the group kv."""
    group.command()(check)
