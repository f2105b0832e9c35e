"""What lies beside the codes of a quantized model and is stored as it is: norms, biases, embedding and head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.core.checkpoint import Checkpoint

if TYPE_CHECKING:
    from distill._settings_parts import Coded


class Rest:
    """The parameters of it that are trained, by their names on disk. Matrices of blocks that no stage quantized are
    not among them: their zeros may be chosen."""

    def __init__(self, settings: Coded, checkpoint: Checkpoint) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self.by_name: dict[str, nn.Parameter] = {}

    def attach(self, model: Any) -> dict[str, nn.Parameter]:
        """Name what is to be trained in a model that nobody changed yet."""
        wanted = set(rest_names(self._checkpoint, self._settings.rest))
        self.by_name = {
            name: value.requires_grad_()
            for name, value in self._checkpoint.disk_views(model.named_parameters()).items()
            if name in wanted and isinstance(value, nn.Parameter)
        }
        return self.by_name

    def share(self, name: str) -> float:
        """The rate of a parameter, over that of codes: a part of the root mean square of its numbers."""
        value = self.by_name[name].detach()
        return float(value.square().mean().sqrt()) * self._settings.rest_rate / self._settings.code_rate

    def tensors(self) -> dict[str, Tensor]:
        """Their values, fp32 on the CPU."""
        return {name: value.detach().cpu() for name, value in self.by_name.items()}


def rest_names(checkpoint: Checkpoint, which: str) -> Iterator[str]:
    """Disk names of what is trained beside codes. `which`: none; norms and biases; or all: embedding and head, too."""
    packed = {part for module in checkpoint.schemes for part in checkpoint.stored_names(module)}
    ends = {checkpoint.embedding_tensor, checkpoint.head_tensor} if which == "all" else set()
    for name, info in checkpoint.tensors.items():
        if which != "none" and name not in packed and (name in ends or len(info.shape) == 1):
            yield name
