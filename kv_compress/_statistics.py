"""What the preflight finds out about the keys and values of a model on calibration text, layer by layer.

Errors are of attention's output: Σ |o' - o|² / Σ |o|² over all tokens, keys or values alone being what the codec leaves
of them. Both together come to about the sum. Where whole pages are coded, first and latest tokens are in full, and only
queries count that find coded pages.

Shape suffixes: B rows, G key-value heads, S tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kv_compress._coded_pages import CodingPoints
from kv_compress._observed import Seen, observed
from kv_compress._paged_rows import attend_paged, coded_rows
from kv_compress.fp8 import scale_for
from kv_compress.policy import FULL, PER_CHANNEL, Coding, KVPolicy, LayerPolicy

if TYPE_CHECKING:
    from compress.core.tokens import Tokens

SINK_TOKENS = 4  # at the beginning of a text
CODECS = ("int8", "int4", "fp8")
Choice = tuple[str, bool]
"""A codec, and whether keys or values are rotated before it."""


@dataclass
class Layer:
    """One layer's figures. Ranges are the largest number of each channel over all tokens. `paged_…`: where whole pages
    are coded, int8 and int4 keys per channel; by codec, empty where the text has no row that is long enough."""

    heads: int
    width: int
    key_range_GD: Tensor
    value_range_GD: Tensor
    sink_share: float = 0.0
    tokens: int = 0
    key_errors: dict[Choice, float] = field(default_factory=dict)
    value_errors: dict[Choice, float] = field(default_factory=dict)
    paged_key_errors: dict[str, float] = field(default_factory=dict)
    paged_value_errors: dict[str, float] = field(default_factory=dict)

    @property
    def key_spread(self) -> float:
        """How far the widest channel of keys reaches, in those of the middle: what few bits suffer from."""
        middle = float(self.key_range_GD.median())
        return float(self.key_range_GD.max()) / middle if middle else float("inf")

    @property
    def largest_key(self) -> float:
        """The largest number in any key."""
        return float(self.key_range_GD.max())

    def scale(self, *, keys: bool) -> float:
        """What fp8 divides by here."""
        return scale_for(float((self.key_range_GD if keys else self.value_range_GD).max()))


def unmeasured(sizes: Sequence[tuple[int, int]]) -> list[Layer]:
    """Layers of so many heads and channels, before anything is known of them: for sums of bytes."""
    return [Layer(heads, width, torch.ones(heads, width), torch.ones(heads, width)) for heads, width in sizes]


def finds_pages(length: int, points: CodingPoints) -> bool:
    """Whether a row of so many tokens has queries that find coded pages, and something to tell by them."""
    return length > points.position(1) + 1


def codecs(width: int) -> tuple[str, ...]:
    """Codecs for heads of so many channels, two of which share a byte of int4."""
    return tuple(codec for codec in CODECS if codec != "int4" or width % 2 == 0)


def choices(width: int) -> list[Choice]:
    """What keys or values may be kept as. Rotation needs a width that is a power of two, and gains floats nothing."""
    turned = [(codec, True) for codec in codecs(width) if codec != "fp8"] if width & (width - 1) == 0 else []
    return [(FULL, False), *((codec, False) for codec in codecs(width)), *turned]


def measure(model: Any, tokens: Tokens, points: CodingPoints | None = None) -> list[Layer]:
    """The figures of every layer; with `points` those of whole pages, too, which are coded there. The text is read
    twice: fp8's scales follow from what the first reading finds."""
    layers: dict[int, Layer] = {}
    energies: dict[int, float] = {}
    late_energies: dict[int, float] = {}

    def look(seen: Seen) -> Tensor:
        weights = seen.weights()
        layer = layers.setdefault(seen.layer, _empty(seen))
        layer.key_range_GD = torch.maximum(layer.key_range_GD, _range(seen.k_BGSD))
        layer.value_range_GD = torch.maximum(layer.value_range_GD, _range(seen.v_BGSD))
        late = weights[..., SINK_TOKENS:, :SINK_TOKENS]
        layer.sink_share += float(late.sum()) / (weights.shape[1] * weights.shape[2])
        layer.tokens += max(0, weights.shape[3] - SINK_TOKENS) * len(weights)
        return seen.attend(weights)

    def try_codecs(seen: Seen) -> Tensor:
        layer, weights = layers[seen.layer], seen.weights()
        plain = seen.attend(weights)
        energies[seen.layer] = energies.get(seen.layer, 0.0) + float(plain.square().sum())
        for choice in choices(layer.width)[1:]:
            keys = _coded(seen.k_BGSD, choice, layer.scale(keys=True))
            values = _coded(seen.v_BGSD, choice, layer.scale(keys=False))
            for errors, result in (
                (layer.key_errors, seen.attend(seen.weights(keys))),
                (layer.value_errors, seen.attend(weights, values)),
            ):
                errors[choice] = errors.get(choice, 0.0) + float((result - plain).square().sum())
        if points is not None and finds_pages(plain.shape[2], points):
            try_pages(seen, layer, plain, points)
        return plain

    def try_pages(seen: Seen, layer: Layer, plain: Tensor, points: CodingPoints) -> None:
        late = slice(points.position(1), None)
        late_energies[seen.layer] = late_energies.get(seen.layer, 0.0) + float(plain[:, :, late].square().sum())
        for codec in codecs(layer.width):
            for errors, policy in (
                (layer.paged_key_errors, LayerPolicy(keys=paged_coding(codec, layer, keys=True))),
                (layer.paged_value_errors, LayerPolicy(values=paged_coding(codec, layer, keys=False))),
            ):
                missed = (attend_paged(seen, policy, points) - plain)[:, :, late]
                errors[codec] = errors.get(codec, 0.0) + float(missed.square().sum())

    for observe in (look, try_codecs):
        with observed(model, observe):
            for _ in _read(model, tokens):
                pass
    for index, layer in layers.items():
        layer.sink_share /= max(1, layer.tokens)
        for errors in (layer.key_errors, layer.value_errors):
            errors |= {choice: error / max(energies[index], 1e-30) for choice, error in errors.items()}
            errors[FULL, False] = 0.0
        for paged in (layer.paged_key_errors, layer.paged_value_errors) if index in late_energies else ():
            paged |= {codec: error / max(late_energies[index], 1e-30) for codec, error in paged.items()}
            paged[FULL] = 0.0
    return [layers[index] for index in sorted(layers)]


def paged_coding(codec: str, layer: Layer, *, keys: bool) -> Coding:
    """Keys or values of a layer where whole pages are coded."""
    scale = (layer.scale(keys=keys),) if codec == "fp8" else ()
    return Coding(codec, scale=scale, per="channel" if keys and codec in PER_CHANNEL else "token")


def token_losses(
    model: Any, tokens: Tokens, policy: KVPolicy | None, points: CodingPoints | None = None
) -> list[Tensor]:
    """Negative log-likelihoods of the tokens of each row but its first, in nats, with keys and values as the policy
    would leave them. A policy that codes whole pages needs its `points`."""

    def code(seen: Seen) -> Tensor | None:
        if policy is None:
            return None
        layer = policy.layers[seen.layer]
        if points is not None:
            return attend_paged(seen, layer, points)
        keys, values = coded_rows(layer.keys, seen.k_BGSD), coded_rows(layer.values, seen.v_BGSD)
        return seen.attend(seen.weights(keys), values)

    found = []
    with observed(model, code):
        for ids_S, logits_SV in _read(model, tokens):
            logs_SV = torch.log_softmax(logits_SV[:-1].float(), -1)
            found.append(-logs_SV.gather(-1, ids_S[1:, None])[:, 0].double().cpu())
    return found


def losses(model: Any, tokens: Tokens, policy: KVPolicy | None) -> float:
    """The mean of `token_losses`."""
    return float(torch.cat(token_losses(model, tokens, policy)).mean())


def key_bias_norms(tensors: Mapping[str, Any], load: Any) -> dict[int, float]:
    """By layer, how long the bias of its key projection is, where it has one of its own."""
    found = {}
    for name in tensors:
        if name.endswith("self_attn.k_proj.bias"):
            found[int(name.split(".layers.")[1].split(".")[0])] = float(load(name).float().norm())
    return found


@torch.inference_mode()
def _read(model: Any, tokens: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and logits, row by row, on the model's device."""
    device = next(model.parameters()).device
    for number, ids_S in enumerate(tokens.ids.to(device)):
        row_S = ids_S if tokens.lengths is None else ids_S[: int(tokens.lengths[number])]
        yield row_S, model(input_ids=row_S[None], use_cache=False).logits[0]


def _empty(seen: Seen) -> Layer:
    _, heads, _, width = seen.k_BGSD.shape
    return Layer(heads, width, torch.zeros(heads, width), torch.zeros(heads, width))


def _range(x_BGSD: Tensor) -> Tensor:
    return x_BGSD.abs().amax((0, 2)).float().cpu()


def _coded(x_BGSD: Tensor, choice: Choice, scale: float) -> Tensor:
    codec, rotate = choice
    return coded_rows(Coding(codec, rotate, (scale,) if codec == "fp8" else ()), x_BGSD)
