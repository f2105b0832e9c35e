"""AWQ files, written here word by word, read by both decoders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import ArtifactError, InputError
from compress.core.formats import _reference, awq, reader_for
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme

ROWS, WIDTH = 64, 96
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output channel in each nibble of a word, from the lowest


def words(numbers_RO: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits [R, O] -> int32 words [R, O/8]."""
    packed = np.zeros((numbers_RO.shape[0], numbers_RO.shape[1] // 8), np.uint32)
    for nibble, channel in enumerate(ORDER):
        packed |= numbers_RO[:, channel::8].astype(np.uint32) << np.uint32(4 * nibble)
    return packed.view(np.int32)


def write(size: int, *, symmetric: bool = False):
    """(tensors, the weight they mean [out, in])."""
    rng = np.random.default_rng(0)
    groups = 1 if size == -1 else -(-WIDTH // size)
    code_KO = rng.integers(0, 16, (WIDTH, ROWS))
    zero_GO = np.full((groups, ROWS), 8) if symmetric else rng.integers(0, 16, (groups, ROWS))
    scale_GO = rng.uniform(0.01, 1, (groups, ROWS)).astype(np.float16)
    group_K = np.arange(WIDTH) // (WIDTH if size == -1 else size)
    weight_KO = (code_KO - zero_GO[group_K]).astype(np.float32) * scale_GO[group_K].astype(np.float32)
    tensors = {
        "m.qweight": torch.from_numpy(words(code_KO)),
        "m.qzeros": torch.from_numpy(words(zero_GO)),
        "m.scales": torch.from_numpy(scale_GO),
    }
    return tensors, torch.from_numpy(weight_KO.T.copy())


def config(size: int = 32, *, zero_point: bool = True) -> dict[str, object]:
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": zero_point, "version": "gemm"}


def test_a_word_holds_the_channels_in_its_own_order() -> None:
    assert words(np.arange(8)[None]).view(np.uint32).tolist() == [[0x75316420]]
    qweight = torch.tensor([[0x75316420]], dtype=torch.int32)
    tensors = {"m.qweight": qweight, "m.qzeros": torch.zeros(1, 1, dtype=torch.int32), "m.scales": torch.ones(1, 8)}
    weight = awq.dequantize("m", tensors.__getitem__, Scheme(4, symmetric=False))
    assert weight[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize("size", [16, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_decoders_read_the_weight(tmp_path: Path, size: int, symmetric: bool) -> None:
    tensors, weight = write(size, symmetric=symmetric)
    reader = reader_for({"quantization_config": config(size, zero_point=not symmetric)})
    assert reader.modules(tensors) == {"m": Scheme(4, size, symmetric=symmetric)}
    scheme = reader.scheme_of("m")
    assert torch.equal(reader.dequantize("m", tensors.__getitem__, scheme, torch.float32), weight)
    assert torch.equal(reader.decode("m", tensors.__getitem__, scheme).dequantize(), weight)
    save_file(tensors, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors")
    assert reader.shape_of("m", scheme, infos) == (ROWS, WIDTH)
    rows = np.array([0, 7, 13, ROWS - 1])
    assert np.array_equal(_reference.weights(reader, "m", infos, scheme, rows), weight[rows].numpy())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda value: value.to(torch.int64), "m.qweight"),
        ("qweight", lambda value: value[:, 0], "m.qweight"),
        ("scales", lambda value: value[1:], "m.scales"),
        ("scales", lambda value: value.to(torch.int32), "m.scales"),
        ("qzeros", lambda value: value[:, 1:], "m.qzeros"),
        ("qzeros", lambda value: value.to(torch.int64), "m.qzeros"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, change, message: str) -> None:
    tensors, _ = write(32)
    tensors[f"m.{name}"] = change(tensors[f"m.{name}"])
    with pytest.raises(ArtifactError, match=message):
        awq.decode("m", tensors.__getitem__, Scheme(4, 32, symmetric=False))


def test_zero_points_beside_zero_point_false_are_an_error() -> None:
    tensors, _ = write(32)
    with pytest.raises(ArtifactError, match="zero_point false"):
        awq.decode("m", tensors.__getitem__, Scheme(4, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits 8"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": None}, "group_size None"),
        ({"zero_point": "yes"}, "zero_point 'yes'"),
        ({"version": "gemv"}, "'gemv'"),
        ({"version": "other"}, "'other'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_configs_that_are_not_read_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        awq.scheme_of("m", config() | changes)


def test_modules_that_the_config_leaves_out() -> None:
    settings = config() | {"modules_to_not_convert": ["o_proj", "visual"], "version": "GEMM"}
    found = [awq.scheme_of(name, settings) for name in ("layers.0.o_proj", "visual.0.up", "layers.0.up")]
    assert found == [None, None, Scheme(4, 32, symmetric=False)]
    tensors, _ = write(32)
    reader = reader_for({"quantization_config": config() | {"modules_to_not_convert": ["m"]}})
    with pytest.raises(InputError, match="leaves it dense"):
        reader.modules(tensors)
