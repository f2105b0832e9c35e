"""Which channels of the residual stream matter, and how much larger norms make what is left of it.

A norm divides by the root mean square of its N inputs. With K of them it divides by the root of another mean: r times
the one before, where r² is the mean square of those that stay over that of all. Its weight times r, on average over
tokens, makes up for that: exactly where the others were zero, as then every token has r² = N / K.

Shape suffixes: T tokens, D channels of the stream, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.passes import Job
from compress.core.walk import Block, See
from prune._surgery import norm_weights, stream_norms

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from prune.hidden import Hidden

ROWS_AT_ONCE = 4096


class Shares:
    """How the squares of a norm's inputs are shared among channels. Means over tokens, each of which counts as much,
    however large it is: of x² over what the norm divides by, squared, fp64 [D], and of 1 over that."""

    def __init__(self, width: int, eps: float) -> None:
        self._eps = eps
        self._share_D = torch.zeros(width, dtype=torch.float64)
        self._inverse = 0.0
        self._tokens = 0

    def add(self, x_TD: Tensor) -> None:
        """Rows of the norm's inputs."""
        square_TD = x_TD.double().square()
        inverse_T = 1 / (square_TD.mean(dim=1) + self._eps).clamp_min(1e-300)
        self._share_D += (square_TD * inverse_T[:, None]).sum(dim=0).cpu()
        self._inverse += float(inverse_T.sum())
        self._tokens += len(x_TD)

    @property
    def mean_D(self) -> Tensor:
        return self._share_D / max(self._tokens, 1)

    def growth(self, kept: list[int], eps: float) -> float:
        """By how much more a norm divides that reads these channels alone and adds `eps` to their mean square."""
        return math.sqrt(float(self.mean_D[kept].mean()) + eps * self._inverse / max(self._tokens, 1))

    def see_input(self, x_TD: Tensor, y_TD: Tensor, share_T: Tensor | None) -> None:
        """Of a norm."""
        self.add(x_TD)

    def see_output(self, x_TD: Tensor, y_TD: Tensor, share_T: Tensor | None) -> None:
        """Of the last block, which the final norm reads."""
        self.add(y_TD)


def choose_channels(settings: Hidden, job: Job, count: int) -> dict[str, Any]:
    """`kept`: the channels that stay, ascending; `factors`: what weights of norms are multiplied by, by their names."""
    checkpoint = job.checkpoint
    if count == settings.total(checkpoint):
        return {"kept": list(range(count)), "factors": {}}
    shares = _shares(job) if settings.calibrated else {}
    by_activation = settings.importance == "activation"
    score_D = _by_activation(checkpoint, shares) if by_activation else _by_magnitude(job)
    kept = sorted(torch.argsort(-score_D, stable=True)[:count].tolist())
    return {"kept": kept, "factors": dict(_factors(settings, checkpoint, shares, kept))}


def _shares(job: Job) -> dict[str, Shares]:
    """What reaches every norm with as many inputs as the stream has channels, by the name of its weight."""
    checkpoint = job.checkpoint
    width, eps = checkpoint.config["hidden_size"], checkpoint.config.get("rms_norm_eps", 0.0)
    found = {name: Shares(width, eps) for name in norm_weights(checkpoint)}

    def watch(block: Block) -> Iterator[tuple[nn.Module, See]]:
        for name in stream_norms(checkpoint) + checkpoint.architecture.output_norms:
            yield block.module.get_submodule(name), found[f"{block.name}.{name}.weight"].see_input
        if block.index == checkpoint.num_blocks - 1:
            yield block.module, found[f"{checkpoint.architecture.final_norm}.weight"].see_output

    for _ in job.measure(watch=watch):
        pass
    return found


def _by_activation(checkpoint: Checkpoint, shares: dict[str, Shares]) -> Tensor:
    """Minitron: the root mean squares of the outputs of all norms inside blocks that read the stream, added up."""
    plus = 1.0 if checkpoint.architecture.norm_plus_one else 0.0
    score_D = torch.zeros(checkpoint.config["hidden_size"], dtype=torch.float64)
    for name in (name for name, kind in norm_weights(checkpoint).items() if kind == "input"):
        score_D += shares[name].mean_D.sqrt() * (checkpoint.tensor(name).double() + plus).abs()
    return score_D


def _by_magnitude(job: Job) -> Tensor:
    """The sum of the squares of all weights that read a channel or write to it."""
    checkpoint = job.checkpoint
    score_D = torch.zeros(checkpoint.config["hidden_size"], dtype=torch.float64)
    for name in {checkpoint.embedding_tensor, checkpoint.head_tensor}:
        for rows in torch.arange(checkpoint.info(name).shape[0]).split(ROWS_AT_ONCE):
            score_D += checkpoint.rows(name, rows).double().square().sum(0)
    for block in job.measure(calibrate=False):
        for group in block.groups:
            for site in group.sites:
                score_D += site.weight.square().sum(0 if group.kind in ("qkv", "gate_up") else 1).double().cpu()
    return score_D


def _factors(
    settings: Hidden, checkpoint: Checkpoint, shares: dict[str, Shares], kept: list[int]
) -> Iterable[tuple[str, float]]:
    """Of embeddings that are multiplied by the root of the stream's width, those that stay become smaller: what output
    norms add to them has to, as well."""
    growth = checkpoint.config["hidden_size"] / len(kept)
    eps = checkpoint.config.get("rms_norm_eps", 0.0)
    for name, kind in norm_weights(checkpoint).items():
        factor = 1.0
        if settings.rescale:  # what reads a stream that became smaller adds as much more to its mean square
            factor = shares[name].growth(kept, eps if kind == "output" else eps * growth)
        if kind == "output" and checkpoint.architecture.scaled_embedding:
            factor /= math.sqrt(growth)
        yield name, factor
