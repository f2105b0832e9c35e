"""Which tensors hold a quantized module in each format, with their types and shapes: for verify.

O output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress.core.errors import ArtifactError
from compress.core.formats import Reader
from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import OWN_GROUPS, Scheme
from compress.core.tensors import words_in

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_I32, _I8, _U8, _F32 = (frozenset({name}) for name in ("I32", "I8", "U8", "F32"))
_FP8 = frozenset({"F8_E4M3"})
# every part that a module may have in a format, under whatever scheme
_PARTS = {
    "awq": ("weight", "qweight", "qzeros", "scales", "g_idx"),
    "bitsandbytes": ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax")
    + ("weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    "compressed-tensors": ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    + ("weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point", "output_scale"),
    "gptq": ("weight", "qweight", "qzeros", "scales", "g_idx"),
}

# types and shapes that a tensor may have
Allowed = tuple[frozenset[str], tuple[tuple[int, ...], ...]]


def check_module_parts(
    reader: Reader, module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]
) -> tuple[int, int]:
    """ArtifactError for a part that is missing, does not belong or does not fit; else the module's shape [out, in]."""
    wanted = reader.stored_names(module, scheme)
    for name in wanted:
        if name not in tensors and not reader.may_lack(name):
            raise ArtifactError("is missing", where=name)
    for part in _PARTS[reader.method]:
        name = f"{module}.{part}"
        if name in tensors and name not in wanted:
            raise ArtifactError(f"does not belong to a {scheme.name} layer", where=name)
    rows, width = reader.shape_of(module, scheme, tensors)
    for part, (dtypes, shapes) in part_shapes(reader.method, scheme, rows, width).items():
        info = tensors.get(f"{module}.{part}")
        if info is not None and (info.shape not in shapes or info.dtype not in dtypes):
            text = f"{' or '.join(sorted(dtypes))} {' or '.join(str(list(shape)) for shape in shapes)}"
            raise ArtifactError(f"is {info.dtype} {list(info.shape)}, the scheme needs {text}", where=info.name)
    return rows, width


def part_shapes(method: str, scheme: Scheme, rows: int, width: int) -> dict[str, Allowed]:
    """Types and shapes of the tensors of a module [rows, width], by the last part of their names."""
    if method == "gptq":
        return _gptq(scheme, rows, width)
    if method == "awq":
        return _awq(scheme, rows, width)
    if method == "bitsandbytes":
        return _bitsandbytes(scheme, rows, width)
    return _compressed_tensors(scheme, rows, width)


def _gptq(scheme: Scheme, rows: int, width: int) -> dict[str, Allowed]:
    groups = scheme.groups_in(width)
    return {
        "qweight": (_I32, ((words_in(width, scheme.bits), rows),)),
        "qzeros": (_I32, ((groups, words_in(rows, scheme.bits)),)),
        "scales": (FLOATS, ((groups, rows),)),
        "g_idx": (_I32, ((width,),)),
    }


def _awq(scheme: Scheme, rows: int, width: int) -> dict[str, Allowed]:
    groups = scheme.groups_in(width)
    return {
        "qweight": (_I32, ((width, rows // 8),)),
        "qzeros": (_I32, ((groups, rows // 8),)),
        "scales": (FLOATS, ((groups, rows),)),
    }


def _bitsandbytes(scheme: Scheme, rows: int, width: int) -> dict[str, Allowed]:
    """Numbers of blocks are the state's; the reader holds them against it."""
    if scheme.dtype == "int":
        return {"weight": (_I8, ((rows, width),)), "SCB": (_F32, ((rows,),)), "weight_format": (_U8, ((), (1,)))}
    size = -(-rows * width // 2)
    return {
        "weight": (_U8, ((size, 1), (1, size))),
        "weight.quant_map": (_F32, ((16,),)),
        "weight.nested_quant_map": (_F32, ((256,),)),
    }


def _compressed_tensors(scheme: Scheme, rows: int, width: int) -> dict[str, Allowed]:
    groups = scheme.groups_in(width)
    scale = FLOATS - {"F64"}
    one: Allowed = (scale, ((1,), ()))
    if scheme.dtype in OWN_GROUPS:
        return {
            "weight_packed": (_U8, ((rows, width // 2),)),
            "weight_scale": (_FP8 if scheme.dtype == "nvfp4" else _U8, ((rows, groups),)),
            "weight_global_scale": (_F32, ((1,), ())),
        }
    if scheme.dtype == "fp8":
        blocks = ((-(-rows // scheme.rows_per_scale), groups),)
        scales = blocks if scheme.blocks else ((rows, 1), (1,), (), (1, 1))
        return {"weight": (_FP8, ((rows, width),)), "weight_scale": (scale, scales), "input_scale": one}
    int8 = scheme.bits == 8 and scheme.activation_bits == 8
    zero_shape = (rows, groups) if int8 else (words_in(rows, scheme.bits), groups)
    return {
        "weight": (_I8, ((rows, width),)),
        "weight_packed": (_I32, ((rows, words_in(width, scheme.bits)),)),
        "weight_scale": (scale, ((rows, groups),)),
        "weight_zero_point": (_I8 if int8 else _I32, (zero_shape,)),
        "input_scale": one,
    }
