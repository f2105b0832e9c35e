"""What the preflight finds out about the keys and values of a model on calibration text, layer by layer.

Errors are of attention's output: Σ |o' - o|² / Σ |o|² over all tokens, keys or values alone being what the codec leaves
of them. Both together come to about the sum.

Shape suffixes: B rows, G key-value heads, S tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kv_compress._coding import round_trip
from kv_compress._observed import Seen, observed
from kv_compress.fp8 import scale_for
from kv_compress.policy import FULL, Coding, KVPolicy

if TYPE_CHECKING:
    from compress.core.tokens import Tokens

SINK_TOKENS = 4  # at the beginning of a text
CODECS = ("int8", "int4", "fp8")
Choice = tuple[str, bool]
"""A codec, and whether keys or values are rotated before it."""


@dataclass
class Layer:
    """One layer's figures. Ranges are the largest number of each channel over all tokens."""

    heads: int
    width: int
    key_range_GD: Tensor
    value_range_GD: Tensor
    sink_share: float = 0.0
    tokens: int = 0
    key_errors: dict[Choice, float] = field(default_factory=dict)
    value_errors: dict[Choice, float] = field(default_factory=dict)

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


def choices(width: int) -> list[Choice]:
    """What keys or values may be kept as. Rotation needs a width that is a power of two, and gains floats nothing."""
    rotated = [(codec, True) for codec in ("int8", "int4")] if width & (width - 1) == 0 else []
    return [(FULL, False), *((codec, False) for codec in CODECS), *rotated]


def measure(model: Any, tokens: Tokens) -> list[Layer]:
    """The figures of every layer. The text is read twice: fp8's scales follow from what the first reading finds."""
    layers: dict[int, Layer] = {}
    energies: dict[int, float] = {}

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
        return plain

    for observe in (look, try_codecs):
        with observed(model, observe):
            for _ in _read(model, tokens):
                pass
    for index, layer in layers.items():
        layer.sink_share /= max(1, layer.tokens)
        for errors in (layer.key_errors, layer.value_errors):
            errors |= {choice: error / max(energies[index], 1e-30) for choice, error in errors.items()}
            errors[FULL, False] = 0.0
    return [layers[index] for index in sorted(layers)]


def losses(model: Any, tokens: Tokens, policy: KVPolicy | None) -> float:
    """Mean negative log-likelihood of the tokens, in nats, with keys and values as the policy would leave them."""

    def code(seen: Seen) -> Tensor | None:
        if policy is None:
            return None
        layer = policy.layers[seen.layer]
        keys, values = _as(layer.keys, seen.k_BGSD), _as(layer.values, seen.v_BGSD)
        return seen.attend(seen.weights(keys), values)

    total, count = 0.0, 0
    with observed(model, code):
        for ids_S, logits_SV in _read(model, tokens):
            logs_SV = torch.log_softmax(logits_SV[:-1].float(), -1)
            total -= float(logs_SV.gather(-1, ids_S[1:, None]).double().sum())
            count += len(ids_S) - 1
    return total / max(1, count)


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
    return _as(Coding(codec, rotate, (scale,) if codec == "fp8" else ()), x_BGSD)


def _as(coding: Coding, x_BGSD: Tensor) -> Tensor:
    scale_G = torch.tensor(coding.scale, device=x_BGSD.device) if coding.scale else None
    x_BSGD = x_BGSD.transpose(1, 2).contiguous()
    return round_trip(coding.codec, x_BSGD, scale_G, rotate=coding.rotate).transpose(1, 2)
