"""`quantization_config` of compressed-tensors: writing the smallest that every reader takes, reading what others wrote.

Only keys that the oldest readers know are written: no actorder, no nulls inside the arguments. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.core.errors import InputError, UsageError
from compress.core.formats import NotRead
from compress.core.scheme import OWN_GROUPS, Scheme

_KNOWN_FORMATS = frozenset({"naive-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "marlin-24"})
_PACKED, _INT, _FLOAT, _MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
_FP4 = {"mxfp4-pack-quantized": "mxfp4", "nvfp4-pack-quantized": "nvfp4"}
_READ = (_PACKED, _INT, _FLOAT, *_FP4)
_FP4_ARGUMENTS: dict[str, dict[str, Any]] = {
    "mxfp4": {"strategy": "group", "scale_dtype": "torch.uint8"},
    "nvfp4": {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
}
_VERSION = "0.18.0"
_ARGUMENTS = frozenset(
    {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"}
    | {"scale_dtype", "zp_dtype", "observer", "observer_kwargs"}
)
_GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_PRESET = re.compile(r"W(?P<bits>[2-8])A(?P<inputs>8|16)(?P<asymmetric>_ASYM)?")
_FLOAT_PRESETS = {
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8_block",
    "MXFP4A16": "mxfp4a16",
    "NVFP4A16": "nvfp4a16",
}
_LINEAR = "Linear"
_MAX_PATTERN = 1000


def is_int_quantized(scheme: Scheme) -> bool:
    """Whether the scheme is stored as plain int8 (W8A8) instead of packed words."""
    return scheme.dtype == "int" and scheme.bits == 8 and scheme.activation_bits == 8


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of an artifact.

    `schemes` gives the scheme of every quantized module; `unquantized` are the linear modules that stay as they are and
    become the `ignore` list. One scheme gives one group of target Linear; several give a group each with exact names.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(module)
    if not by_scheme:
        raise UsageError("no module is quantized: there is no quantization_config to write")
    ordered = sorted(by_scheme, key=lambda scheme: (-len(by_scheme[scheme]), repr(scheme)))
    formats = {format_of(scheme) for scheme in ordered}
    groups = {}
    for index, scheme in enumerate(ordered):
        targets = sorted(by_scheme[scheme], key=_natural)
        if len(ordered) == 1:  # the class, and by name what is not of that class, or not in all engines
            targets = [_LINEAR, *(name for name in targets if not _in_block(name))]
        groups[f"group_{index}"] = _group(scheme, targets)
        if len(formats) > 1 or (format_of(scheme) == _PACKED and scheme.activation_bits == 8):
            # beside 8-bit inputs the library would take packed words for plain int8, if it had to guess
            groups[f"group_{index}"]["format"] = format_of(scheme)
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": _MIXED if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(unquantized, key=_natural),
    }


def format_of(scheme: Scheme) -> str:
    """The format's name for the way a scheme is stored."""
    if scheme.dtype == "fp8":
        return _FLOAT
    if scheme.dtype in OWN_GROUPS:
        return f"{scheme.dtype}-pack-quantized"
    return _INT if is_int_quantized(scheme) else _PACKED


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """The `weights` of a config group."""
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.dtype == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "dynamic": False,
    }
    if scheme.strategy == "group":
        weights["group_size"] = scheme.group_size
    if scheme.strategy == "block":
        weights["block_structure"] = [scheme.rows_per_scale, scheme.group_size]
    return weights | _FP4_ARGUMENTS.get(scheme.dtype, {})


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = weight_arguments(scheme)
    group: dict[str, Any] = {"targets": targets, "weights": weights}
    if scheme.activation_bits == 8:
        inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True}
        group["input_activations"] = inputs | _input_scales(scheme)
    return group


def _input_scales(scheme: Scheme) -> dict[str, Any]:
    """Of the arguments of inputs those that say what a scale is for."""
    if scheme.blocks:
        return {"strategy": "group", "group_size": scheme.group_size, "dynamic": True}
    if scheme.static_inputs:
        return {"strategy": "tensor", "dynamic": False}
    return {"strategy": "token", "dynamic": True}


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def scheme_of(module: str, config: Mapping[str, Any], *, class_name: str = _LINEAR) -> Scheme | None:
    """Scheme of `module` under a model's `quantization_config`, None if it is not quantized.

    Targets are exact names, `re:` patterns (matched at the start) and class names, in this order of precedence;
    `class_name` is the module's class. InputError names what we cannot read.
    """
    check_config(config)
    if any(_matches(module, class_name, entry) for entry in config.get("ignore") or ()):
        return None
    found: tuple[int, str] | None = None
    for key, group in config["config_groups"].items():
        for target in _targets(key, group):
            if _matches(module, class_name, target):
                rank = 0 if target == module else 1 if target.startswith("re:") else 2
                found = (rank, key) if found is None or rank < found[0] else found
    return None if found is None else group_scheme(config, found[1])


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse, by name, a `quantization_config` that is not well formed."""
    where = "config.json: quantization_config"
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError("config_groups is missing or empty", where=where)
    if config.get("quantization_status", "compressed") != "compressed":
        raise InputError(f"quantization_status {config['quantization_status']!r} is not a finished model", where=where)
    if config.get("sparsity_config"):
        raise NotRead("sparsity_config is not supported: save the model without sparse compression", where=where)
    if config.get("transform_config"):
        raise NotRead("transform_config (online rotations) is not supported", where=where)
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        raise InputError("ignore is not a list of names", where=where)
    for key, group in groups.items():
        _targets(key, group)


def _targets(key: str, group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, Mapping) else group
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        where = f"config.json: quantization_config.config_groups.{key}"
        raise InputError("targets is not a list of names", where=where)
    return targets


def _matches(module: str, class_name: str, entry: str) -> bool:
    if not entry.startswith("re:"):
        return entry in (module, class_name)
    try:
        if len(entry) > _MAX_PATTERN:
            raise re.error("the pattern is too long")
        return re.match(entry[3:], module) is not None
    except re.error as error:
        raise InputError(
            f"{entry!r} is not a valid pattern: {error}", where="config.json: quantization_config"
        ) from None


def group_scheme(config: Mapping[str, Any], key: str) -> Scheme | None:
    """Scheme of one config group (None: the group leaves weights alone); InputError for what we cannot read."""
    where = f"config.json: quantization_config.config_groups.{key}"
    group = config["config_groups"][key]
    if not isinstance(group, Mapping):
        return _preset(key, where)
    unknown = sorted(set(group) - _GROUP_KEYS)
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}", where=where)
    if group.get("weights") is None:
        return None
    if group.get("output_activations") is not None:
        raise NotRead("quantized outputs are not supported", where=f"{where}.output_activations")
    written = group.get("format") or config.get("format")
    if written not in _READ:
        refusal = NotRead if written in _KNOWN_FORMATS else InputError
        raise refusal(f"format {written!r} is not read", where=where, hint=f"{', '.join(_READ)} are")
    if written in _FP4:
        return _fp4(group, _FP4[written], where)
    kind = "float" if written == _FLOAT else "int"
    scheme = _weights(group["weights"], kind, f"{where}.weights")
    if group.get("input_activations") is not None:
        scheme = _with_inputs(scheme, group["input_activations"], kind, f"{where}.input_activations")
    if written != format_of(scheme):
        raise NotRead(f"{scheme.name} as {written} is not read", where=where)
    return scheme


def _fp4(group: Mapping[str, Any], dtype: str, where: str) -> Scheme:
    """Weights as 4-bit floats, which have one form each, beside inputs that are left alone."""
    if group.get("input_activations") is not None:
        raise NotRead("4-bit inputs are not supported: only inputs in 16 bits are", where=f"{where}.input_activations")
    arguments, where = group["weights"], f"{where}.weights"
    _check_arguments(arguments, where)
    scheme = Scheme.parse(f"{dtype}a16")
    for key, value in weight_arguments(scheme).items():
        found = arguments.get(key, value)
        if found != value and not (key == "type" and str(found).lower() == value):
            raise NotRead(f"{key} {found!r} is not read in this format: {value!r} is", where=where)
    return scheme


def _preset(key: str, where: str) -> Scheme:
    if key.upper() in _FLOAT_PRESETS:
        return Scheme.parse(_FLOAT_PRESETS[key.upper()])
    match = _PRESET.fullmatch(key.upper())
    if match is None:
        raise InputError(f"preset {key!r} is not supported", where=where)
    bits, inputs = int(match["bits"]), int(match["inputs"])
    size = -1 if bits == inputs == 8 else 128
    return Scheme(bits, size, symmetric=match["asymmetric"] is None, activation_bits=inputs)


def _weights(arguments: Any, kind: str, where: str) -> Scheme:
    _check_arguments(arguments, where)
    bits, size = arguments.get("num_bits", 8), arguments.get("group_size")
    stated = str(arguments.get("type", "int")).lower()
    if stated != kind or (kind == "float" and bits != 8):
        takes = "integers" if kind == "int" else "float8"
        raise NotRead(f"{stated}{bits} weights are not read in this format: only {takes} are", where=where)
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"num_bits {bits!r} is not supported: 2 to 8 are read", where=where)
    if arguments.get("dynamic", False) is not False:
        raise InputError("dynamic weights make no sense", where=where)
    if arguments.get("actorder") not in (None, False, "static", "weight"):
        hint = "activation order with a group index was removed from readers; use static order"
        raise InputError(f"actorder {arguments['actorder']!r} is not supported", where=where, hint=hint)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1):
        raise InputError(f"group_size {size!r} makes no sense", where=where)
    strategy = arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    known = ("channel", "group") if kind == "int" else ("channel", "tensor", "block")
    if strategy not in known:
        refusal = NotRead if strategy in ("tensor", "block", "group", "tensor_group") else InputError
        raise refusal(f"strategy {strategy!r} is not read: {', '.join(known)} are", where=where)
    if strategy == "group" and (size is None or size < 1):
        raise InputError("strategy group needs a positive group_size", where=where)
    if strategy == "channel" and size is not None and size > 0:
        raise InputError(f"group_size {size} contradicts strategy channel", where=where)
    symmetric = arguments.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise InputError(f"symmetric {symmetric!r} is neither true nor false", where=where)
    if kind == "float":
        if not symmetric:
            raise InputError("float weights have no zero points", where=where)
        if strategy == "block":
            return Scheme(8, _block_size(arguments.get("block_structure"), where), dtype="fp8", blocks=True)
        return Scheme(8, dtype="fp8")
    return Scheme(bits, int(size) if strategy == "group" and size else -1, symmetric=symmetric)


def _block_size(structure: Any, where: str) -> int:
    if not isinstance(structure, list) or len(structure) != 2 or not all(type(size) is int for size in structure):
        raise InputError(f"block_structure {structure!r} is not two whole numbers", where=where)
    if structure[0] != structure[1] or structure[0] < 1:
        raise NotRead(f"blocks of {structure} are not read: only square ones are, like [128, 128]", where=where)
    return structure[0]


def _with_inputs(weights: Scheme, arguments: Any, wanted: str, where: str) -> Scheme:
    """The scheme of such weights, with inputs rounded as the arguments say."""
    _check_arguments(arguments, where)
    kind, bits = str(arguments.get("type", "int")).lower(), arguments.get("num_bits", 8)
    if (kind, bits) != (wanted, 8):
        raise NotRead(f"{kind}{bits} inputs are not supported: only dynamic {wanted}8 per token is read", where=where)
    if arguments.get("symmetric", True) is not True:
        raise NotRead("asymmetric inputs are not supported", where=where)
    static = arguments.get("dynamic", False) is False and weights.group_size == -1 and weights.bits == 8
    scheme = replace(weights, activation_bits=8, static_inputs=static)
    known = _input_scales(scheme)
    if any(arguments.get(name, False) != value for name, value in known.items()):
        what = f"dynamic per token and group of {scheme.group_size}" if scheme.blocks else "dynamic per token"
        what = "static per tensor or dynamic per token" if static else what
        raise NotRead(f"only inputs that are {what} are read beside such weights", where=where)
    return scheme


def _check_arguments(arguments: Any, where: str) -> None:
    if not isinstance(arguments, Mapping):
        raise InputError("is not a mapping", where=where)
    unknown = sorted(str(key) for key in set(arguments) - _ARGUMENTS)
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}", where=where)
