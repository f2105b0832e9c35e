"""An adapter that is given with the source: LoRA pairs in a folder as PEFT writes it.

A weight W becomes W + scale · B A, with A and B the lora_A and lora_B of its layer, and scale lora_alpha / r, or
lora_alpha / √r with rank-stabilized LoRA (Hu et al., 2022, arXiv:2106.09685; Kalajdzievski, 2023, arXiv:2312.03732).
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core._model_folder import read_json
from compress.core.checkpoint import FLOATS, Source
from compress.core.errors import InputError
from compress.core.safetensors_io import TensorInfo, read_header

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
_OF_ANOTHER_KIND = (
    "fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Pair:
    """Where A [R, K] and B [O, R] of one layer lie, and what their product counts."""

    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A folder with an adapter, `config` as PEFT wrote it, and its tensors."""

    folder: Path
    source: Source
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, adapter: str, *, offline: bool = False) -> Adapter:
        """Open a folder, or a hub id. InputError for what is no LoRA adapter, or of a kind that is not merged."""
        folder, source = Path(adapter), Source(Path(adapter).absolute().name)
        if not folder.is_dir():
            from compress.core.hub import snapshot

            folder, commit = snapshot(adapter, offline=offline)
            source = Source(adapter, commit)
        if not (folder / CONFIG).is_file():
            raise InputError(f"not an adapter: the folder has no {CONFIG}", where=str(folder))
        if not (folder / WEIGHTS).is_file():
            pickled = (folder / PICKLED).is_file()
            message = f"the weights are pickled ({PICKLED}): only safetensors are read"
            raise InputError(message if pickled else f"{WEIGHTS} is missing", where=str(folder))
        config = read_json(folder / CONFIG)
        _require_plain(config, str(folder / CONFIG))
        return cls(folder, source, config, read_header(folder / WEIGHTS))

    def sha256(self) -> dict[str, str]:
        """Digests of both files by name."""
        return dict(self._sha256)

    @cached_property
    def _sha256(self) -> dict[str, str]:
        from compress.core.files import sha256_file

        return {name: sha256_file(self.folder / name) for name in (CONFIG, WEIGHTS)}

    @property
    def base(self) -> str | None:
        """What it says that it was made for."""
        return self.config.get("base_model_name_or_path") or None

    def record(self) -> dict[str, Any]:
        """Which adapter this is, for the lineage."""
        return {"source": self.source.id, "revision": self.source.revision, "sha256": self.sha256()}

    def pairs(self, checkpoint: Checkpoint) -> dict[str, Pair]:
        """The pairs by the disk names of their layers. InputError if one has no place in the checkpoint."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise InputError(
                    f"{name} is no matrix of a LoRA pair, so that it is not merged", where=str(self.folder)
                )
            found.setdefault(match["module"], {})[match["part"]] = info
        if not found:
            raise InputError("the adapter holds no pair", where=str(self.folder))
        return {module: self._pair(module, parts, checkpoint) for module, parts in sorted(found.items())}

    def _pair(self, module: str, parts: dict[str, TensorInfo], checkpoint: Checkpoint) -> Pair:
        for_whom = f"; it was made for {self.base}" if self.base else ""
        if f"{module}.weight" not in checkpoint.tensors:
            tied = checkpoint.tied and module == checkpoint.architecture.head
            why = (
                "whose head is its embedding, not a layer of its own" if tied else f"which has no such layer{for_whom}"
            )
            raise InputError(
                f"the adapter changes {module} of the model {checkpoint.source.id}, {why}", where=str(self.folder)
            )
        if parts.keys() != {"A", "B"}:
            raise InputError(f"{module} has one matrix of its pair and not the other", where=str(self.folder))
        a, b = parts["A"], parts["B"]
        weight = checkpoint.matrix_shape(module) if len(checkpoint.info(f"{module}.weight").shape) == 2 else None
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != weight:
            raise InputError(
                f"the pair of {module} is {list(b.shape)} times {list(a.shape)}, "
                f"and the model's weight {list(weight or ())}{for_whom}",
                where=str(self.folder),
            )
        if a.dtype not in FLOATS or b.dtype not in FLOATS:
            raise InputError(f"the pair of {module} is {a.dtype}, not floating-point", where=str(self.folder))
        return Pair(a, b, self._scale(module, a.shape[0]))

    def _scale(self, module: str, rank: int) -> float:
        alphas = self.config.get("alpha_pattern") or {}
        own = next((key for key in alphas if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = float(self.config.get("lora_alpha", 8) if own is None else alphas[own])
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def require_alone(checkpoint: Checkpoint) -> None:
    """InputError if an adapter lies with the model and nobody has said whether it counts."""
    if (checkpoint.folder / CONFIG).is_file():
        raise InputError(
            f"an adapter lies in the model's folder ({CONFIG})",
            where=str(checkpoint.folder),
            hint="`adapter:` with this folder merges it; without its files the model is taken as it is",
        )


def _require_plain(config: dict[str, Any], where: str) -> None:
    """InputError, by the name of the setting, for what is more than pairs beside linear layers."""
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise InputError(f"an adapter of the type {kind} is not merged, only LORA is", where=where)
    hint = "merge it with PEFT (merge_and_unload), and give the result as the model"
    for name in _OF_ANOTHER_KIND:
        if config.get(name):
            raise InputError(f"an adapter with {name} is not merged", where=where, hint=hint)
    if config.get("bias", "none") != "none":
        raise InputError(f"an adapter with bias: {config['bias']} is not merged", where=where, hint=hint)
    start = str(config.get("init_lora_weights"))
    if start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"an adapter with init_lora_weights: {start} is not merged: it belongs to weights that this start changed",
            where=where,
            hint="save it as a plain one (path_initial_model_for_weight_conversion of PEFT's save_pretrained)",
        )
