"""The transformers model of a config without its weights: where blocks, embedding and head get their code from.

Parameters stay on the meta device (no memory); buffers, which no file holds, are computed by the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.core._experts import UnfusedExperts
from compress.core.architectures import Architecture
from compress.core.errors import InputError
from compress.core.rounded_inputs import rounded_inputs
from compress.core.scheme import Scheme
from compress.core.sizes import PER_LAYER_KEY

CAST_ELEMENTS = 4 << 20
KEPT_CASTS_BYTES = 32 << 20


class StoredLinear(nn.Linear):
    """A linear layer whose weight stays as stored (mapped from its file) and is cast to the input's dtype in use.

    The cast goes by tiles of rows that stay in cache; the tiling is fixed, so the same input gives the same bits.
    """

    keeps_cast = False
    cast: Tensor | None = None
    scheme: Scheme | None = None
    input_scale: Tensor | None = None

    def round_inputs(self, scheme: Scheme, input_scale: Tensor | None) -> None:
        """Round what comes in as `scheme` says; `input_scale` [1] is that of static inputs."""
        self.scheme, self.input_scale = scheme, input_scale

    def forward(self, input: Tensor) -> Tensor:
        if self.scheme is not None:
            rows_MK = rounded_inputs(
                input.detach().reshape(-1, self.in_features).float(), self.scheme, self.input_scale
            )
            rounded = rows_MK.view(input.shape).to(input.dtype)
            through = torch.is_grad_enabled() and input.requires_grad  # the gradient goes straight through
            input = rounded + (input - input.detach()) if through else rounded
        if self.weight.dtype == input.dtype:
            return super().forward(input)
        if self.keeps_cast:
            if self.cast is None:
                self.cast = self.weight.to(input.dtype)
            return nn.functional.linear(input, self.cast, self.bias)
        rows = max(1, CAST_ELEMENTS // self.in_features)
        if torch.is_grad_enabled() or rows >= self.out_features:
            return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)
        output = input.new_empty(*input.shape[:-1], self.out_features)
        for start in range(0, self.out_features, rows):
            tile = self.weight[start : start + rows].to(input.dtype)
            output[..., start : start + rows] = nn.functional.linear(input, tile)
        return output if self.bias is None else output.add_(self.bias)


@contextmanager
def keeping_casts(module: nn.Module) -> Iterator[None]:
    """Inside, while no weight is replaced, small layers are cast once and not at every call."""
    room, layers = KEPT_CASTS_BYTES, []
    for layer in module.modules():
        if isinstance(layer, StoredLinear) and layer.weight.numel() <= CAST_ELEMENTS:
            room -= 4 * layer.weight.numel()
            layer.keeps_cast = room >= 0
            layers.append(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps_cast, layer.cast = False, None


class Skeleton:
    """`model` is the causal LM on the meta device; `block(i)` and friends are copies to be filled with weights."""

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        config: Mapping[str, Any] | None = None,
        widths: Sequence[int] | None = None,
    ) -> None:
        """`config` stands in for the folder's config.json; `widths` are those of the blocks' feed-forward networks,
        where they differ."""
        self.architecture = architecture
        self.config = _read_config(folder, config)
        self.model = _on_meta(self.config, architecture, folder)
        for module in self.model.modules():
            if module._buffers:
                _compute_buffers(self.model, module)
        self.blocks: nn.ModuleList = self.model.get_submodule(architecture.blocks)  # type: ignore[assignment]
        self._uneven = widths is not None
        if widths is not None:
            self._narrow(widths)

    def _narrow(self, widths: Sequence[int]) -> None:
        """Give the feed-forward network of each block its own width: transformers builds all alike."""
        sites = {group.name: group.sites for group in self.architecture.groups_of(0)}
        widest = self.config.intermediate_size
        for block, width in zip(self.blocks, widths, strict=True):
            for path in (*sites["gate_up"], *sites["down"]):
                old = block.get_submodule(path)
                rows, columns = old.get_parameter("weight").shape
                if path in sites["down"]:
                    columns = width
                else:
                    rows = rows // widest * width  # a fused layer has gate and up, one behind the other
                new = nn.Linear(columns, rows, "bias" in dict(old.named_parameters()), device="meta")
                block.set_submodule(path, new.requires_grad_(False))

    def block(self, index: int) -> nn.Module:
        """An empty copy of block `index`; fused experts are replaced by one linear layer per matrix."""
        block = copy.deepcopy(self.blocks[index])
        experts = self.architecture.experts
        if experts is not None and _has(block, experts.module):
            block.set_submodule(experts.module, UnfusedExperts.like(block.get_submodule(experts.module), experts))
        return _keep_stored(block)

    def module(self, path: str) -> nn.Module:
        """An empty copy of any other module, by its path."""
        return copy.deepcopy(self.model.get_submodule(path))

    def copied(self) -> Any:
        """The whole model, empty."""
        return copy.deepcopy(self.model)

    def without_layers(self, layers: list[nn.Module]) -> nn.Module:
        """The base model with other layers, without embedding and final norm: fed with inputs_embeds, it shows what
        it passes to its layers."""
        return self._base(layers, nn.Identity())

    def head(self) -> nn.Module:
        """The causal LM without embedding and blocks: from inputs_embeds to logits, empty."""
        names = self.architecture
        model = copy.copy(self.model)
        model._modules = dict(model._modules)
        model.set_submodule(names.base, self._base([], self.module(names.final_norm)))
        model.set_submodule(names.head, _keep_stored(self.module(names.head)))
        return model

    def load(self, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> Any:
        """The whole model with weights by their disk names."""
        if self._uneven:
            return self._assigned(state, dtype, where)
        from transformers.utils import logging

        quiet = not logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model, found = type(self.model).from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=state,
                dtype=dtype,
                attn_implementation=_attention(type(self.model)),
                output_loading_info=True,
            )
        finally:
            if not quiet:
                logging.enable_progress_bar()
        missing = sorted(found["missing_keys"]) + sorted(found["mismatched_keys"])
        if missing:
            raise InputError(f"tensor {missing[0]!r} is missing or has another shape", where=where)
        return model.eval().requires_grad_(False)

    def _assigned(self, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> Any:
        """The same for widths that transformers' own loader does not know."""
        model = copy.deepcopy(self.model)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        names = self.architecture
        embedding, head = f"{names.embedding}.weight", f"{names.head}.weight"
        if self.config.tie_word_embeddings:  # files may hold it under either name
            tied = state.get(embedding, state.get(head))
            state = state | ({} if tied is None else {embedding: tied, head: tied})
        wrong = [name for name, shape in sorted(wanted.items()) if name not in state or state[name].shape != shape]
        if wrong:
            raise InputError(f"tensor {wrong[0]!r} is missing or has another shape", where=where)
        found = {name: nn.Parameter(state[name].to(dtype), requires_grad=False) for name in wanted}
        model.load_state_dict(found, strict=False, assign=True)
        model.tie_weights()
        return model.eval()

    def _base(self, layers: list[nn.Module], norm: nn.Module) -> nn.Module:
        names = self.architecture
        base = copy.copy(self.model.get_submodule(names.base))
        base._modules = dict(base._modules)
        inside = f"{names.base}."
        base.set_submodule(names.embedding.removeprefix(inside), nn.Identity())
        base.set_submodule(names.blocks.removeprefix(inside), nn.ModuleList(layers))
        base.set_submodule(names.final_norm.removeprefix(inside), norm)
        return base


def fill(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype, device: str) -> None:
    """Make `value` the parameter `name` of `module`: as it is for the weight of a linear layer, else in `dtype`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    stored = isinstance(owner, StoredLinear) and leaf == "weight" and value.is_floating_point()
    owner._parameters[leaf] = nn.Parameter(value.to(device, value.dtype if stored else dtype), requires_grad=False)


def stored_linear(module: nn.Module) -> StoredLinear:
    """The linear layer itself, with the behaviour of a StoredLinear."""
    if type(module) is nn.Linear:
        module.__class__ = StoredLinear
    if not isinstance(module, StoredLinear):
        raise TypeError(f"{type(module).__name__} is no linear layer")
    return module


def _keep_stored(module: nn.Module) -> nn.Module:
    for linear in module.modules():
        if type(linear) is nn.Linear:
            stored_linear(linear)
    return module


def _has(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())


def _read_config(folder: Path, instead: Mapping[str, Any] | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if instead is not None:
            config = type(config).from_dict(dict(instead))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        last_line = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"transformers refuses it: {last_line}", where=str(folder / "config.json")) from error
    setattr(config, PER_LAYER_KEY, None)  # transformers knows the entry, but no model that is built by it
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


def _on_meta(config: Any, architecture: Architecture, folder: Path) -> Any:
    import transformers

    family = getattr(transformers, architecture.model_class)
    try:
        with torch.device("meta"):
            model = family._from_config(config, attn_implementation=_attention(family), dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"no model can be built from it: {error}", where=str(folder / "config.json")) from error
    return model.eval().requires_grad_(False)


def _attention(family: Any) -> str:
    """sdpa with the model's own causal masks; families with soft-capped attention (Gemma-2) only have eager."""
    return "sdpa" if family._supports_sdpa else "eager"


def _compute_buffers(model: Any, module: nn.Module) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model._init_weights(module)
