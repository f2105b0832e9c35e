"""GPTQ files, written here by a plain bit-by-bit writer, read by both decoders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import ArtifactError, InputError
from compress.core.formats import _reference, gptq, reader_for
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme

ROWS, WIDTH = 64, 96


def bit_stream(numbers_CR: np.ndarray, bits: int) -> np.ndarray:
    """Columns of numbers [count, R] -> int32 words [ceil(count*bits/32), R], bit by bit."""
    count, rows = numbers_CR.shape
    words = np.zeros((-(-count * bits // 32), rows), np.uint64)
    for index in range(count):
        for bit in range(bits):
            place = index * bits + bit
            words[place // 32] |= ((numbers_CR[index].astype(np.uint64) >> bit) & 1) << np.uint64(place % 32)
    return words.astype(np.uint32).view(np.int32)


def write(bits: int, size: int, symmetric: bool, version: int, *, shuffled: bool = False):
    """(tensors, the weight they mean [out, in])."""
    rng = np.random.default_rng(bits)
    groups = 1 if size == -1 else WIDTH // size
    code_KO = rng.integers(0, 1 << bits, (WIDTH, ROWS))
    zero_GO = np.full((groups, ROWS), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (groups, ROWS))
    scale_GO = rng.uniform(0.01, 1, (groups, ROWS)).astype(np.float16)
    group_K = np.arange(WIDTH) // (WIDTH if size == -1 else size)
    if shuffled:
        group_K = rng.permutation(group_K)
    weight_KO = (code_KO - zero_GO[group_K]).astype(np.float32) * scale_GO[group_K].astype(np.float32)
    tensors = {
        "m.qweight": torch.from_numpy(bit_stream(code_KO, bits)),
        "m.qzeros": torch.from_numpy(bit_stream((zero_GO - (version == 1)).T, bits).T.copy()),
        "m.scales": torch.from_numpy(scale_GO),
        "m.g_idx": torch.from_numpy(group_K.astype(np.int32)),
    }
    return tensors, torch.from_numpy(weight_KO.T.copy())


def config(bits: int, size: int, symmetric: bool, version: int = 1) -> dict[str, object]:
    form = "gptq" if version == 1 else "gptq_v2"
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "checkpoint_format": form}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_both_decoders_read_the_weight(tmp_path: Path, bits: int, size: int, symmetric: bool, version: int) -> None:
    tensors, weight = write(bits, size, symmetric, version)
    settings = config(bits, size, symmetric, version)
    reader = reader_for({"quantization_config": settings})
    assert reader.modules(tensors) == {"m": Scheme(bits, size, symmetric=symmetric)}
    scheme = reader.scheme_of("m")
    assert torch.equal(reader.dequantize("m", tensors.__getitem__, scheme, torch.float32), weight)
    assert torch.equal(reader.decode("m", tensors.__getitem__, scheme).dequantize(), weight)
    save_file(tensors, tmp_path / "m.safetensors")
    rows = np.array([0, 7, ROWS - 1])
    again = _reference.gptq("m", read_header(tmp_path / "m.safetensors"), scheme, rows, version)
    assert np.array_equal(again, weight[rows].numpy())


def test_activation_order_is_undone_but_not_kept() -> None:
    tensors, weight = write(4, 32, True, 1, shuffled=True)
    scheme = Scheme(4, 32)
    assert torch.equal(gptq.dequantize("m", tensors.__getitem__, scheme), weight)
    with pytest.raises(InputError, match="activation order"):
        gptq.decode("m", tensors.__getitem__, scheme)


def test_the_group_index_may_be_missing() -> None:
    tensors, weight = write(4, 32, True, 1)
    del tensors["m.g_idx"]
    assert torch.equal(gptq.dequantize("m", tensors.__getitem__, Scheme(4, 32)), weight)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda value: value.to(torch.int64), "qweight"),
        ("scales", lambda value: value[1:], "scales"),
        ("qzeros", lambda value: value[:, 1:], "qzeros"),
        ("qzeros", lambda value: torch.full_like(value, -1), "cannot mean"),
        ("qzeros", lambda value: torch.zeros_like(value), "says sym"),
        ("g_idx", lambda value: value + 1, "outside 0"),
        ("g_idx", lambda value: value - 1, "outside 0"),
        ("g_idx", lambda value: value[1:], "g_idx"),
        ("g_idx", lambda value: value.float(), "g_idx"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, change, message: str) -> None:
    tensors, _ = write(4, 32, True, 1)
    tensors[f"m.{name}"] = change(tensors[f"m.{name}"])
    with pytest.raises(ArtifactError, match=message):
        gptq.decode("m", tensors.__getitem__, Scheme(4, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits 5"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size 0"),
        ({"sym": None}, "sym None"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "x"}, "'x'"),
        ({"pack_dtype": "int16"}, "int16"),
        ({"dynamic": []}, None),
        ({"dynamic": [1]}, "dynamic"),
        ({"dynamic": {"+:(": {}}}, "not a valid pattern"),
        ({"dynamic": {"+:m": 3}}, "not a mapping"),
    ],
)
def test_configs_that_are_not_read_are_named(changes: dict[str, object], message: str | None) -> None:
    settings = config(4, 32, True) | changes
    if message is None:
        assert gptq.scheme_of("m", settings) == Scheme(4, 32)
        return
    with pytest.raises(InputError, match=message):
        gptq.scheme_of("m", settings)


def test_dynamic_changes_and_leaves_out_layers() -> None:
    settings = config(4, 32, True) | {"dynamic": {"-:.*o_proj": {}, "+:.*down": {"bits": 8, "group_size": -1}}}
    found = [gptq.scheme_of(name, settings) for name in ("a.o_proj", "a.down", "a.up", "lm_head")]
    assert found == [None, Scheme(8, -1), Scheme(4, 32), None]
