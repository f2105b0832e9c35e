"""Broken and malicious artifacts: each fails a check that names file and field, in under a second; none raises."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.files import sha256_file
from compress.core.formats import compressed_tensors
from compress.core.manifest import MANIFEST_NAME, Coverage, FileRecord, Manifest
from compress.core.scheme import Scheme
from compress.core.verify import verify
from tests.quantized_folders import quantize_weight, write_quantized

Q = "model.layers.0.self_attn.q_proj"
SHARD, REST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], None]
ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound artifacts: symmetric, asymmetric, W8A8, GPTQ and one with a manifest."""
    root = tmp_path_factory.mktemp("sound")
    schemes = {
        "symmetric": Scheme(4, 32),
        "asymmetric": Scheme(4, 32, symmetric=False),
        "w8a8": Scheme(8, -1, activation_bits=8),
    }
    for name, scheme in schemes.items():
        write_quantized(root / name, scheme, shards=True)
    folder = write_quantized(root / "manifest", Scheme(4, 32), shards=True)
    quantized = {f"{module}.weight" for module in folder.modules}
    coverage = tuple(Coverage(name, "quantized" if name in quantized else "kept") for name in folder.source)
    files = tuple(FileRecord(f.name, f.stat().st_size, sha256_file(f)) for f in sorted(folder.path.iterdir()))
    (folder.path / MANIFEST_NAME).write_text(Manifest("1", files, {}, {}, {}, coverage).text())
    shutil.copytree(ORACLES / "gptqmodel-w4", root / "gptq")
    return {path.name: path for path in root.iterdir()}


def test_the_sound_ones_pass(sound: dict[str, Path]) -> None:
    for path in sound.values():
        assert verify(path).ok, path


# ---------------------------------------------------------------------- ways to break one
def tensors(change: Callable[[dict[str, torch.Tensor]], None], file: str = SHARD, *, index: bool = True) -> Change:
    """Change the tensors of a shard; the index is made to agree, so that only the tensors themselves can be noticed."""

    def apply(folder: Path) -> None:
        name = file if (folder / file).exists() else "model.safetensors"
        held = load_file(folder / name)
        change(held)
        save_file({key: value.contiguous() for key, value in held.items()}, folder / name)
        if index and (folder / INDEX).exists():
            data = json.loads((folder / INDEX).read_text())
            kept = {key: value for key, value in data["weight_map"].items() if value != name}
            data["weight_map"] = kept | dict.fromkeys(held, name)
            (folder / INDEX).write_text(json.dumps(data))

    return apply


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor], file: str = SHARD) -> Change:
    return tensors(lambda held: held.__setitem__(name, make(held[name])), file)


def add(name: str, value: torch.Tensor, file: str = SHARD) -> Change:
    return tensors(lambda held: held.__setitem__(name, value), file)


def drop(name: str, file: str = SHARD) -> Change:
    return tensors(lambda held: held.pop(name), file)


def config(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | changes))

    return apply


def quantization(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data["quantization_config"])
        (folder / "config.json").write_text(json.dumps(data))

    return apply


def weights(**changes: Any) -> Change:
    return quantization(lambda data: data["config_groups"]["group_0"]["weights"].update(changes))


def write(name: str, data: bytes | str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return apply


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        change(data)
        (folder / INDEX).write_text(json.dumps(data))

    return apply


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the JSON header of a shard and leave its data as it is."""

    def apply(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        data = json.loads(raw[8 : 8 + length])
        change(data)
        text = json.dumps(data).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return apply


def manifest(change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> Change:
    """Change the manifest, with a digest that fits (a liar's) or without."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / MANIFEST_NAME).read_text())
        change(data)
        text = json.dumps(data)
        (folder / MANIFEST_NAME).write_text(Manifest.parse(text).text() if signed else text)

    return apply


def link(name: str, target: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def copy(name: str, to: str) -> Change:
    return lambda folder: shutil.copy(folder / name, folder / to)


def truncate(name: str, keep: float) -> Change:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return make


def quantize_head(held: dict[str, torch.Tensor]) -> None:
    head = quantize_weight(held.pop("lm_head.weight"), Scheme(4, 32))
    held.update(compressed_tensors.encode("lm_head", head))


def store_dense(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.startswith(Q)]:
        del held[name]
    held[f"{Q}.weight"] = torch.ones(64, 64)


NAN, INF = float("nan"), float("inf")
ENTRY = f"{Q}.weight_packed"

# name: (which sound artifact, what is done to it, words of the failed check: file or tensor, and field)
CASES: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    # tensors of a quantized layer
    "scale_nan": ("symmetric", replace(f"{Q}.weight_scale", first(NAN)), (f"{Q}.weight_scale", "NaN")),
    "scale_infinite": ("symmetric", replace(f"{Q}.weight_scale", first(INF)), (f"{Q}.weight_scale", "infinite")),
    "scale_zero": ("symmetric", replace(f"{Q}.weight_scale", first(0)), (f"{Q}.weight_scale", "zero")),
    "scale_short": ("symmetric", replace(f"{Q}.weight_scale", lambda t: t[:, :1]), (f"{Q}.weight_scale", "[64, 2]")),
    "scale_long": (
        "symmetric",
        replace(f"{Q}.weight_scale", lambda t: t.repeat(1, 2)),
        (f"{Q}.weight_scale", "[64, 4]"),
    ),
    "scale_flat": ("symmetric", replace(f"{Q}.weight_scale", torch.flatten), (f"{Q}.weight_scale", "[128]")),
    "scale_integer": ("symmetric", replace(f"{Q}.weight_scale", lambda t: t.int()), (f"{Q}.weight_scale", "I32")),
    "scale_missing": ("symmetric", drop(f"{Q}.weight_scale"), (f"{Q}.weight_scale", "missing")),
    "packed_short": ("symmetric", replace(ENTRY, lambda t: t[:, :-1]), (ENTRY, "[64, 8]")),
    "packed_few_rows": ("symmetric", replace(ENTRY, lambda t: t[:-1]), (ENTRY, "[63, 8]")),
    "packed_int64": ("symmetric", replace(ENTRY, lambda t: t.long()), (ENTRY, "I64")),
    "packed_empty": ("symmetric", replace(ENTRY, lambda t: t[:0]), (ENTRY, "[0, 8]")),
    "packed_missing": ("symmetric", drop(ENTRY), (ENTRY, "missing")),
    "shape_missing": ("symmetric", drop(f"{Q}.weight_shape"), (f"{Q}.weight_shape", "missing")),
    "shape_zero": ("symmetric", replace(f"{Q}.weight_shape", lambda t: t * 0), (f"{Q}.weight_shape", "[0, 0]")),
    "shape_negative": ("symmetric", replace(f"{Q}.weight_shape", lambda t: -t), (f"{Q}.weight_shape", "[-64, -64]")),
    "shape_huge": ("symmetric", replace(f"{Q}.weight_shape", lambda t: t * 0 + (1 << 62)), (ENTRY, "the scheme needs")),
    "shape_swapped": (
        "symmetric",
        replace("model.layers.0.mlp.up_proj.weight_shape", lambda t: t.flip(0)),
        ("up_proj",),
    ),
    "shape_three": ("symmetric", replace(f"{Q}.weight_shape", lambda t: t.repeat(2)[:3]), (f"{Q}.weight_shape", "[3]")),
    "shape_float": ("symmetric", replace(f"{Q}.weight_shape", lambda t: t.float()), (f"{Q}.weight_shape", "F32")),
    "dense_beside_packed": ("symmetric", add(f"{Q}.weight", torch.zeros(64, 64)), (f"{Q}.weight", "w4a16")),
    "zero_point_extra": (
        "symmetric",
        add(f"{Q}.weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)),
        ("zero_point",),
    ),
    "head_quantized_but_tied": (
        "symmetric",
        lambda folder: (
            tensors(quantize_head, REST)(folder),
            quantization(lambda data: data.update(ignore=[]))(folder),
            config(tie_word_embeddings=True)(folder),
        ),
        ("lm_head", "tied"),
    ),
    "group_index_extra": ("symmetric", add(f"{Q}.weight_g_idx", torch.zeros(64, dtype=torch.int32)), ("weight_g_idx",)),
    "zero_point_missing": ("asymmetric", drop(f"{Q}.weight_zero_point"), (f"{Q}.weight_zero_point", "missing")),
    "zero_point_unpacked": (
        "asymmetric",
        replace(f"{Q}.weight_zero_point", lambda t: torch.zeros(64, 2, dtype=torch.int8)),
        (f"{Q}.weight_zero_point", "I8"),
    ),
    "zero_point_short": (
        "asymmetric",
        replace(f"{Q}.weight_zero_point", lambda t: t[:-1]),
        ("weight_zero_point", "[7, 2]"),
    ),
    "int8_as_int32": ("w8a8", replace(f"{Q}.weight", lambda t: t.int()), (f"{Q}.weight", "I32")),
    "int8_scale_per_group": (
        "w8a8",
        replace(f"{Q}.weight_scale", lambda t: t.repeat(1, 2)),
        ("weight_scale", "[64, 2]"),
    ),
    "int8_one_dimension": ("w8a8", replace(f"{Q}.weight", torch.flatten), (f"{Q}.weight", "two dimensions")),
    "layer_stored_dense": (
        "symmetric",
        tensors(store_dense),
        (f"{Q}.weight", "stored dense"),
    ),
    # GPTQ
    "group_index_out_of_range": ("gptq", replace(f"{Q}.g_idx", first(2)), (f"{Q}.g_idx", "outside")),
    "group_index_negative": ("gptq", replace(f"{Q}.g_idx", first(-1)), (f"{Q}.g_idx", "outside")),
    "group_index_short": ("gptq", replace(f"{Q}.g_idx", lambda t: t[1:]), (f"{Q}.g_idx", "[63]")),
    "gptq_zero_points_missing": ("gptq", drop(f"{Q}.qzeros"), (f"{Q}.qzeros", "missing")),
    "gptq_zero_points_lie": ("gptq", replace(f"{Q}.qzeros", first(0)), (f"{Q}.qzeros", "sym")),
    "gptq_scales_short": ("gptq", replace(f"{Q}.scales", lambda t: t[1:]), (f"{Q}.scales", "[1, 64]")),
    "gptq_scale_nan": ("gptq", replace(f"{Q}.scales", first(NAN)), (f"{Q}.scales", "NaN")),
    "gptq_bits": ("gptq", quantization(lambda data: data.update(bits=8)), ("qzeros", "scheme")),
    "gptq_bits_unknown": ("gptq", quantization(lambda data: data.update(bits=77)), ("quantization_config", "bits 77")),
    "gptq_group_size": ("gptq", quantization(lambda data: data.update(group_size=64)), ("the scheme needs",)),
    "gptq_version": (
        "gptq",
        quantization(lambda data: data.update(checkpoint_format="v9")),
        ("checkpoint_format", "v9"),
    ),
    "gptq_pattern": ("gptq", quantization(lambda data: data.update(dynamic={"+:(": {}})), ("dynamic", "pattern")),
    # dense tensors
    "norm_nan": ("symmetric", replace("model.norm.weight", first(NAN), REST), ("model.norm.weight", "NaN")),
    "embedding_infinite": (
        "symmetric",
        replace("model.embed_tokens.weight", first(-INF), REST),
        ("embed_tokens", "infinite"),
    ),
    "embedding_short": (
        "symmetric",
        replace("model.embed_tokens.weight", lambda t: t[:-1], REST),
        ("embed_tokens", "[95, 64]"),
    ),
    "norm_wide": (
        "symmetric",
        replace("model.norm.weight", lambda t: t.repeat(2), REST),
        ("model.norm.weight", "[128]"),
    ),
    "norm_missing": ("symmetric", drop("model.norm.weight", REST), ("model.norm.weight", "missing")),
    "head_missing": ("symmetric", drop("lm_head.weight", REST), ("lm_head.weight", "missing")),
    "layer_norm_missing": ("symmetric", drop("model.layers.0.input_layernorm.weight"), ("input_layernorm", "missing")),
    "layer_too_many": (
        "symmetric",
        add("model.layers.2.input_layernorm.weight", torch.ones(64)),
        ("num_hidden_layers",),
    ),
    "layer_number_huge": ("symmetric", add(f"model.layers.{10**8}.x.weight", torch.ones(1)), ("num_hidden_layers",)),
    "layer_number_long": (
        "symmetric",
        add(f"model.layers.{'9' * 5000}.mlp.up_proj.weight", torch.ones(1)),
        ("up_proj",),
    ),
    # config.json
    "config_missing": ("symmetric", remove("config.json"), ("config.json", "missing")),
    "config_not_json": ("symmetric", write("config.json", "{"), ("config.json", "JSON")),
    "config_a_list": ("symmetric", write("config.json", "[]"), ("config.json", "object")),
    "config_duplicate_key": ("symmetric", write("config.json", '{"a": 1, "a": 2}'), ("config.json", "twice")),
    "config_not_text": ("symmetric", write("config.json", b"\xff\xfe"), ("config.json", "UTF-8")),
    "config_deep": ("symmetric", write("config.json", "[" * 200_000), ("config.json", "JSON")),
    "config_no_family": ("symmetric", config(model_type=None), ("config.json", "model_type")),
    "config_hidden_size": ("symmetric", config(hidden_size=32), ("config.json asks for",)),
    "config_vocabulary": ("symmetric", config(vocab_size=97), ("config.json asks for", "[97, 64]")),
    "config_layers": ("symmetric", config(num_hidden_layers=3), ("config.json", "num_hidden_layers is 3")),
    "config_layers_huge": ("symmetric", config(num_hidden_layers=10**9), ("config.json", "num_hidden_layers")),
    "config_heads_zero": ("symmetric", config(num_attention_heads=0), ("config.json", "num_attention_heads")),
    "config_heads_text": ("symmetric", config(num_attention_heads="4"), ("config.json", "num_attention_heads")),
    "config_heads_too_many": ("symmetric", config(num_attention_heads=128, head_dim=None), ("config.json", "head_dim")),
    "config_size_overflow": ("symmetric", config(intermediate_size=10**30), ("config.json", "intermediate_size")),
    "config_size_boolean": ("symmetric", config(hidden_size=True), ("config.json", "hidden_size")),
    "quantization_a_list": ("symmetric", config(quantization_config=[]), ("quantization_config", "mapping")),
    "quantization_gone": ("symmetric", config(quantization_config=None), (Q, "missing")),
    "quantization_unnamed": ("symmetric", config(quantization_config={}), ("quant_method", "unnamed")),
    "quantization_method": ("symmetric", config(quantization_config={"quant_method": "x"}), ("quant_method", "'x'")),
    "format_unknown": ("symmetric", quantization(lambda data: data.update(format="zip")), ("config_groups", "'zip'")),
    "groups_missing": ("symmetric", quantization(lambda data: data.pop("config_groups")), ("config_groups", "missing")),
    "group_null": ("symmetric", quantization(lambda data: data.update(config_groups={"group_0": None})), ("group_0",)),
    "targets_number": (
        "symmetric",
        quantization(lambda data: data["config_groups"]["group_0"].update(targets=[1])),
        ("group_0", "targets"),
    ),
    "ignore_everything": ("symmetric", quantization(lambda data: data.update(ignore=["re:.*"])), ("leaves it dense",)),
    "pattern_broken": ("symmetric", quantization(lambda data: data.update(ignore=["re:["])), ("pattern",)),
    "key_unknown": ("symmetric", weights(colour="red"), ("weights", "'colour'")),
    "bits_wrong": ("symmetric", weights(num_bits=8), ("weight_packed", "scheme needs")),
    "bits_zero": ("symmetric", weights(num_bits=0), ("weights", "num_bits 0")),
    "bits_text": ("symmetric", weights(num_bits="four"), ("weights", "'four'")),
    "group_size_wrong": ("symmetric", weights(group_size=16), ("weight_scale", "scheme needs")),
    "group_size_huge": ("symmetric", weights(group_size=10**30), ("the scheme needs",)),
    "symmetry_lie": ("symmetric", weights(symmetric=False), ("weight_zero_point", "missing")),
    "status_unfinished": (
        "symmetric",
        quantization(lambda data: data.update(quantization_status="frozen")),
        ("status",),
    ),
    # index and shards
    "index_missing": ("symmetric", remove(INDEX), (INDEX, "missing")),
    "index_not_json": ("symmetric", write(INDEX, "nonsense"), (INDEX, "JSON")),
    "index_no_map": ("symmetric", write(INDEX, "{}"), (INDEX, "weight_map")),
    "index_wrong_shard": ("symmetric", index(lambda d: d["weight_map"].update({ENTRY: REST})), (INDEX, ENTRY)),
    "index_extra": ("symmetric", index(lambda d: d["weight_map"].update({"ghost": SHARD})), (INDEX, "ghost")),
    "index_lacks": ("symmetric", index(lambda d: d["weight_map"].pop(ENTRY)), (INDEX, ENTRY)),
    "index_leads_out": ("symmetric", index(lambda d: d["weight_map"].update({ENTRY: "../x"})), (INDEX, "../x")),
    "index_number": ("symmetric", index(lambda d: d["weight_map"].update({ENTRY: 5})), (INDEX, "5")),
    "index_total_lies": ("manifest", index(lambda d: d["metadata"].update(total_size=1)), (INDEX,)),
    "shard_missing": ("symmetric", remove(SHARD), (SHARD, "missing")),
    "shard_twice": ("symmetric", copy(SHARD, "model-copy.safetensors"), ("model-copy.safetensors", "is also in")),
    "shard_beside_single": ("symmetric", copy(SHARD, "model.safetensors"), ("is also in",)),
    "no_weights": ("gptq", remove("model.safetensors"), ("no safetensors",)),
    "header_overlap": (
        "symmetric",
        header(lambda d: d[ENTRY].update(data_offsets=[0, d[ENTRY]["data_offsets"][1] - d[ENTRY]["data_offsets"][0]])),
        (SHARD, "tensor"),
    ),
    "header_beyond_end": ("symmetric", header(lambda d: d[ENTRY].update(data_offsets=[10**9, 10**9 + 2048])), (SHARD,)),
    "header_huge_shape": ("symmetric", header(lambda d: d[ENTRY].update(shape=[1 << 40, 1 << 40])), (SHARD, ENTRY)),
    "header_negative": ("symmetric", header(lambda d: d[ENTRY].update(shape=[-64, -8])), (SHARD, ENTRY)),
    "header_dtype": ("symmetric", header(lambda d: d[ENTRY].update(dtype="F99")), (SHARD, ENTRY, "F99")),
    "header_truncated": ("symmetric", truncate(SHARD, 0.001), (SHARD, "truncated")),
    "data_truncated": ("symmetric", truncate(SHARD, 0.9), (SHARD, "truncated")),
    "data_appended": ("symmetric", lambda f: (f / SHARD).open("ab").write(b"x"), (SHARD, "belong to no tensor")),
    "header_length_huge": ("symmetric", write(SHARD, b"\xff" * 64), (SHARD, "truncated")),
    "shard_empty": ("symmetric", write(SHARD, b""), (SHARD, "truncated")),
    "shard_a_folder": ("symmetric", lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), (SHARD, "missing")),
    # names, links, pickles
    "link_to_file": ("symmetric", link("tokenizer.json", "/etc/hostname"), ("tokenizer.json", "symbolic link")),
    "link_to_shard": ("symmetric", link("again.json", SHARD), ("again.json", "symbolic link")),
    "link_dangling": ("symmetric", link(SHARD, "nowhere"), (SHARD, "symbolic link")),
    "link_to_folder": ("symmetric", link("more", "/"), ("more", "symbolic link")),
    "pipe": ("symmetric", lambda f: os.mkfifo(f / "pipe"), ("pipe", "neither")),
    "pickle": ("symmetric", write("pytorch_model.bin", b"\x80\x02x."), ("pytorch_model.bin", "pickle")),
    "pickle_disguised": ("symmetric", write("tokenizer.json", b"\x80\x04\x95abc."), ("tokenizer.json", "pickle")),
    "archive_disguised": ("symmetric", write("merges.txt", b"PK\x03\x04abc"), ("merges.txt", "archive")),
    "case_clash": ("symmetric", write("CONFIG.json", "{}"), ("config.json", "upper and lower case")),
    # the manifest
    "manifest_not_json": ("manifest", write(MANIFEST_NAME, "{"), (MANIFEST_NAME, "JSON")),
    "manifest_not_text": ("manifest", write(MANIFEST_NAME, b"\xff"), (MANIFEST_NAME, "UTF-8")),
    "manifest_later_version": (
        "manifest",
        manifest(lambda d: d.update(schema_version=9), signed=False),
        ("schema_version 9",),
    ),
    "manifest_touched": (
        "manifest",
        manifest(lambda d: d["lineage"].update(x=1), signed=False),
        (MANIFEST_NAME, "digest"),
    ),
    "manifest_leads_out": (
        "manifest",
        manifest(lambda d: d["files"][0].update(path="../../etc/passwd"), signed=False),
        (MANIFEST_NAME, "leads out"),
    ),
    "manifest_absolute": (
        "manifest",
        manifest(lambda d: d["files"][0].update(path="/etc/passwd"), signed=False),
        ("leads out",),
    ),
    "manifest_file_missing": ("manifest", remove("config.json"), ("config.json", "missing")),
    "manifest_file_extra": ("manifest", write("extra.txt", "x"), ("extra.txt", "not listed")),
    "manifest_size": ("manifest", manifest(lambda d: d["files"][1].update(size=1)), ("bytes, the manifest says 1",)),
    "manifest_hash": ("manifest", manifest(lambda d: d["files"][1].update(sha256="0" * 64)), ("SHA-256",)),
    "manifest_twice": ("manifest", manifest(lambda d: d["files"].append(d["files"][0])), (MANIFEST_NAME, "twice")),
    "coverage_drops": (
        "manifest",
        manifest(lambda d: d["coverage"][1].update(status="dropped")),
        ("dropped without a reason",),
    ),
    "coverage_drops_with_reason": (
        "manifest",
        manifest(lambda d: d["coverage"][0].update(status="dropped", reason="tied")),
        ("dropped, but is here",),
    ),
    "coverage_forgets": ("manifest", manifest(lambda d: d["coverage"].pop()), ("no counterpart in the source",)),
    "coverage_forgets_quantized": (
        "manifest",
        manifest(lambda d: d.update(coverage=[c for c in d["coverage"] if c["tensor"] != f"{Q}.weight"])),
        (Q, "the source has no such weight"),
    ),
    "coverage_claims": ("manifest", manifest(lambda d: d["coverage"][0].update(status="quantized")), ("but is not",)),
    "coverage_invents": (
        "manifest",
        manifest(lambda d: d["coverage"].append({"tensor": "x", "status": "kept", "reason": ""})),
        ("x", "missing"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_noticed_and_named(tmp_path: Path, sound: dict[str, Path], name: str) -> None:
    base, change, words = CASES[name]
    folder = tmp_path / "artifact"
    shutil.copytree(sound[base], folder)
    change(folder)
    started = time.process_time()
    report = verify(folder, library=True)
    seconds = time.process_time() - started
    details = [check.detail for check in report.checks if not check.ok]
    assert details, "passed"
    assert any(all(word in detail for word in words) for detail in details), details
    assert all("\n" not in detail and len(detail) < 6000 for detail in details)
    assert seconds < 1


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
