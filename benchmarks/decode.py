"""Dense weights of a quantized artifact, read with numpy alone: one decoder for the files of all tools.

It shares no code with the product or with a peer. Formats: `pack-quantized`, `int-quantized` and `float-quantized`
(e4m3) of compressed-tensors (codes dense-packed, as since its version 0.18), and GPTQ (`gptq`, which stores the zero
minus one, and `gptq_v2`).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NUMPY_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": np.uint8,
}  # fmt: skip


def e4m3(code: int) -> float:
    """The number that a byte means: sign, four bits of exponent (bias 7), three of fraction; no infinities."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return float("nan") if code & 127 == 127 else -size if code & 128 else size


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of one file, bf16 and e4m3 widened to fp32."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            file.seek(start + first)
            array = np.frombuffer(file.read(last - first), NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] == "F8_E4M3":
                array = E4M3[array]
            yield name, array


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in read_safetensors(path)}


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unsigned codes [rows, count] from int32 words [rows, n]: one bit stream per row, lowest bit first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    codes = stream[:, : count * bits].reshape(words.shape[0], count, bits)
    return codes @ (1 << np.arange(bits, dtype=np.int32))


def per_column(parameters: np.ndarray, columns: int) -> np.ndarray:
    """Scales or zeros [rows, groups] -> [rows, columns]."""
    return np.repeat(parameters, columns // parameters.shape[1], axis=1)


def decode_pack_quantized(tensors: dict[str, np.ndarray], prefix: str, bits: int) -> np.ndarray:
    rows, columns = (int(size) for size in tensors[f"{prefix}.weight_shape"])
    codes = unpack(tensors[f"{prefix}.weight_packed"], bits, columns) - (1 << (bits - 1))
    zeros = tensors.get(f"{prefix}.weight_zero_point")
    if zeros is not None:
        codes = codes - per_column(unpack(zeros.T, bits, rows).T - (1 << (bits - 1)), columns)
    return codes * per_column(tensors[f"{prefix}.weight_scale"].astype(np.float32), columns)


def decode_gptq(tensors: dict[str, np.ndarray], prefix: str, bits: int, zero_offset: int) -> np.ndarray:
    group_of_column = tensors[f"{prefix}.g_idx"]
    codes = unpack(tensors[f"{prefix}.qweight"].T, bits, group_of_column.size)
    scales = tensors[f"{prefix}.scales"].astype(np.float32)
    zeros = unpack(tensors[f"{prefix}.qzeros"], bits, scales.shape[1]) + zero_offset
    return (codes - zeros.T[:, group_of_column]) * scales.T[:, group_of_column]


def dense_weights(folder: Path) -> dict[str, np.ndarray]:
    """Name -> fp32 array of every weight that a dense model of this artifact has."""
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    tensors = stored_tensors(folder)
    if settings is None:
        return tensors
    dense: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            dense[f"{prefix}.weight"] = decode_pack_quantized(tensors, prefix, bits_of(settings))
        elif kind == "qweight":
            zero_offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
            dense[f"{prefix}.weight"] = decode_gptq(tensors, prefix, settings["bits"], zero_offset)
        elif kind == "weight" and f"{prefix}.weight_scale" in tensors:
            scale = tensors[f"{prefix}.weight_scale"].astype(np.float32)
            dense[name] = array.astype(np.float32) * per_column(scale, array.shape[1])
        elif kind in ("weight", "bias"):
            dense[name] = array.astype(np.float32)
    return dense


def bits_of(settings: dict[str, object]) -> int:
    bits = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    if len(bits) != 1:
        raise ValueError(f"this decoder takes one width per artifact, found {sorted(bits)}")
    return bits.pop()
