"""Reading safetensors: every lie of a header is refused by name, tensors are mapped, rows are read alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import InputError
from compress.core.safetensors_io import load_rows, load_tensor, raw_bytes, read_header, read_metadata

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]}}  # fmt: skip


def write(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | fields}


LIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "truncated data": (GOOD, {"data": bytes(23)}, r"the file is truncated"),
    "bytes of no tensor": (GOOD, {"data": bytes(25)}, r"bytes that belong to no tensor"),
    "header past the end": (GOOD, {"length": 1 << 20}, r"truncated within its header"),
    "header length overflows": (GOOD, {"length": (1 << 64) - 1}, r"truncated within its header"),
    "overlap": (changed("b", data_offsets=[8, 16]), {}, r"tensor 'b' overlaps"),
    "gap": (changed("b", data_offsets=[17, 25]), {"data": bytes(25)}, r"tensor 'b' leaves a gap"),
    "wrong size": (changed("a", shape=[2, 3]), {}, r"tensor 'a' of F32 \[2, 3\] does not fit in its 16 bytes"),
    "product overflows": (changed("a", shape=[1 << 62, 1 << 62, 0, 4]), {}, r"tensor 'a' .* does not fit"),
    "negative shape": (changed("a", shape=[-2, -2]), {}, r"tensor 'a' has a shape or offset"),
    "boolean shape": (changed("a", shape=[True, 4]), {}, r"tensor 'a' has a shape or offset"),
    "negative offset": (changed("a", data_offsets=[-16, 0]), {}, r"tensor 'a' has a shape or offset"),
    "float offset": (changed("a", data_offsets=[0, 16.0]), {}, r"tensor 'a' has a shape or offset"),
    "unknown dtype": (changed("a", dtype="F5"), {}, r"tensor 'a' has unknown dtype 'F5'"),
    "dtype no string": (changed("a", dtype=["F32"]), {}, r"tensor 'a' has unknown dtype"),
    "entry lacks offsets": (GOOD | {"a": {"dtype": "F32", "shape": [4]}}, {}, r"entry of tensor 'a' is malformed"),
    "entry is a list": (GOOD | {"a": [1]}, {}, r"entry of tensor 'a' is malformed"),
    "three offsets": (changed("a", data_offsets=[0, 8, 16]), {}, r"entry of tensor 'a' is malformed"),
    "no JSON": (b"{'a': 1}", {}, r"not JSON"),
    "no UTF-8": (b"\xff\xfe{}", {}, r"not JSON"),
    "deep nesting": (b"[" * 200_000, {}, r"not JSON"),
    "a list": ([1, 2], {}, r"not a JSON object"),
    "name twice": (json.dumps(GOOD).replace('"b"', '"a"').encode(), {}, r"names 'a' twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    header, options, message = LIES[lie]
    path = write(tmp_path / "lie.safetensors", header, **options)
    with pytest.raises(InputError, match=message) as refusal:
        read_header(path)
    assert refusal.value.where == str(path)
    assert "\n" not in str(refusal.value)


def test_the_honest_twin_of_the_lies_is_read(tmp_path: Path) -> None:
    infos = read_header(write(tmp_path / "good.safetensors", GOOD))
    assert [(info.name, info.dtype, info.shape, info.bytes) for info in infos.values()] == [
        ("a", "F32", (2, 2), 16), ("b", "I64", (1,), 8)]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="truncated"):
        read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(InputError, match="over the limit of 100 MB"):
        read_header(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")


TENSORS = {
    "bf16": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "f16": torch.arange(6, dtype=torch.float16).view(2, 3),
    "f32": torch.arange(12, dtype=torch.float32).view(3, 4),
    "f64": torch.arange(3, dtype=torch.float64),
    "f8": torch.tensor([0.5, 1.0, -2.0]).to(torch.float8_e4m3fn),
    "i8": torch.tensor([[-128, 127]], dtype=torch.int8),
    "u8": torch.tensor([0, 255], dtype=torch.uint8),
    "i32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    "i64": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert read_metadata(path) == {"format": "pt"}
    assert infos.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        found = load_tensor(infos[name])
        assert found.dtype is expected.dtype
        assert found.shape == expected.shape
        assert found.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()
        assert bytes(raw_bytes(infos[name])) == bytes(expected.reshape(-1).view(torch.uint8).tolist())


def test_unaligned_tensors_are_read_too(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = write(tmp_path / "odd.safetensors", header, b"\x07" + struct.pack("<2f", 1.5, -2.5))
    assert load_tensor(read_header(path)["b"]).tolist() == [1.5, -2.5]


def test_a_mapped_tensor_takes_no_memory_of_its_own_and_cannot_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    save_file({"w": torch.ones(8 << 20)}, path)
    before = _anonymous_kilobytes()
    tensor = load_tensor(read_header(path)["w"])
    assert float(tensor.sum()) == 8 << 20
    assert _anonymous_kilobytes() - before < 8 << 10
    tensor[0] = 5.0
    assert float(load_tensor(read_header(path)["w"])[0]) == 1.0


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    save_file({"w": torch.arange(20.0).view(10, 2)}, path)
    rows = load_rows(read_header(path)["w"], torch.tensor([9, 0, 9]))
    assert rows.tolist() == [[18.0, 19.0], [0.0, 1.0], [18.0, 19.0]]


def _anonymous_kilobytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(next(line for line in status.read_text().splitlines() if line.startswith("RssAnon")).split()[1])
