"""verify: what passes, what it says, and that no flipped bit passes. Broken ones: tests/hostile/test_artifacts.py."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core._verify_folder import check_names
from compress.core._verify_shapes import require_shapes
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.files import sha256_file
from compress.core.manifest import MANIFEST_NAME, Coverage, FileRecord, Manifest
from compress.core.scheme import Scheme
from compress.core.sizes import sizes_of
from compress.core.verify import VerifyReport, verify
from tests.quantized_folders import QuantizedFolder, tiny_llama, write_quantized, write_weights

SCHEMES = [
    Scheme(4, 32),
    Scheme(3, -1, symmetric=False),
    Scheme(8, -1, activation_bits=8),
    Scheme(8, -1, symmetric=False, activation_bits=8),
]


def write_manifest(folder: QuantizedFolder, *, parity: dict[str, object] | None = None) -> None:
    """What a run would write beside the weights."""
    coverage = tuple(
        Coverage(name, "quantized" if name.removesuffix(".weight") in folder.modules else "kept", "")
        for name in folder.source
    )
    write_manifest_of(folder.path, coverage, parity)


def write_manifest_of(path: Path, coverage: tuple[Coverage, ...], parity: dict[str, object] | None = None) -> None:
    files = tuple(
        FileRecord(file.name, file.stat().st_size, sha256_file(file))
        for file in sorted(path.iterdir())
        if file.name != MANIFEST_NAME
    )
    manifest = Manifest("1", files, {}, {}, {"source": "tiny"}, coverage, parity=parity)
    (path / MANIFEST_NAME).write_text(manifest.text())


def write_source(path: Path, folder: QuantizedFolder) -> Path:
    path.mkdir()
    config = json.loads((folder.path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    write_weights(path, folder.source)
    return path


def failed(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.ok}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.symmetric}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_artifact_passes_all_checks(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    folder = write_quantized(tmp_path / "artifact", scheme, dtype=dtype, shards=True, tied=True)
    write_manifest(folder)
    report = verify(folder.path, source=write_source(tmp_path / "source", folder), level="coverage", library=True)
    names = [check.name for check in report.checks]
    wanted = ["names", "manifest", "config", "headers", "index", "quantization", "layers", "shapes", "contents"]
    assert names[: len(wanted)] == wanted
    assert failed(report).keys() <= {"lineage"}  # this source has no recorded hashes
    assert "library" in names
    assert report.bytes > 0


def test_the_library_is_imported_only_when_asked(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, Scheme(4, 32))
    script = (
        "import sys; from compress.core.verify import verify; report = verify(sys.argv[1]); "
        "print(report.ok, 'compressed_tensors' in sys.modules, 'transformers' in sys.modules, report.notices[-1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True False False library: not asked; --library has compressed-tensors read")


def with_lineage(folder: QuantizedFolder, source: Path) -> None:
    write_manifest(folder)
    path = folder.path / MANIFEST_NAME
    manifest = Manifest.parse(path.read_text())
    manifest.lineage["sha256"] = {file.name: sha256_file(file) for file in source.iterdir()}
    path.write_text(manifest.text())


def test_coverage_against_the_source(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "artifact", Scheme(4, 32))
    source = write_source(tmp_path / "source", folder)
    with_lineage(folder, source)
    report = verify(folder.path, source=source)
    assert report.ok, failed(report)
    assert report.level == "coverage"
    details = {check.name: check.detail for check in report.checks}
    assert details["coverage"] == "14 quantized, 7 kept, 0 dropped"
    assert details["kept"] == "7 tensors equal to the byte"
    assert "largest relative error" in details["closeness"]


def test_coverage_without_a_manifest(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "artifact", Scheme(4, 32))
    report = verify(folder.path, source=write_source(tmp_path / "source", folder))
    assert report.ok, failed(report)


def test_coverage_needs_something_to_compare_with(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "artifact", Scheme(4, 32))
    assert "needs a manifest or the source" in failed(verify(folder.path, level="coverage"))["coverage"]


def test_another_source_is_noticed(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "artifact", Scheme(4, 32))
    source = write_source(tmp_path / "source", folder)
    with_lineage(folder, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    save_file(tensors, source / "model.safetensors")
    found = failed(verify(folder.path, source=source))
    assert "is not the model.safetensors that the artifact was made from" in found["lineage"]
    assert found["kept"].startswith("model.norm.weight: was kept, but differs")
    assert found["closeness"].startswith("model.layers.0.mlp.up_proj: is ")


def test_a_source_with_other_tensors_is_noticed(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "artifact", Scheme(4, 32))
    source = write_source(tmp_path / "source", folder)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, source / "model.safetensors")
    found = failed(verify(folder.path, source=source))
    assert "model.layers.0.self_attn.q_norm.weight: was dropped without a reason" in found["coverage"]


def test_a_dense_model_passes(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    report = verify(tmp_path)
    assert report.ok, failed(report)
    assert report.level == "integrity"


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3_text", "phi3", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe"]
)
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
def test_the_shapes_of_every_family_are_known(tiny_model, family: str, odd: bool) -> None:
    report = verify(tiny_model(family, odd))
    assert report.ok, failed(report)
    shapes = next(check.detail for check in report.checks if check.name == "shapes")
    assert "3 layers" in shapes


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("qwen3_moe", "model.layers.2.mlp.experts.0.up_proj.weight"),
        ("qwen3_moe", "model.layers.1.mlp.up_proj.weight"),
        ("gemma2", "model.norm.weight"),
    ],
)
def test_a_missing_weight_is_noticed_in_artifacts_and_sources(tiny_model, tmp_path: Path, family, name) -> None:
    source = tiny_model(family)
    require_shapes(Checkpoint.open(source))
    broken = tmp_path / "model"
    shutil.copytree(source, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors[name]
    save_file(tensors, broken / "model.safetensors")
    assert f"{name}: is missing" in failed(verify(broken))["shapes"]
    with pytest.raises(InputError, match=f"{broken}: {name}: is missing"):
        require_shapes(Checkpoint.open(broken))


def test_a_quantized_source_fits_its_config(tmp_path: Path) -> None:
    for number, scheme in enumerate(SCHEMES):
        require_shapes(Checkpoint.open(write_quantized(tmp_path / str(number), scheme).path))


def test_the_bundled_model_is_a_source_by_its_name(tmp_path: Path) -> None:
    report = verify(write_quantized(tmp_path, Scheme(4, 32)).path, source="demo")
    assert next(check.ok for check in report.checks if check.name == "source")


def test_an_unknown_family_is_checked_as_far_as_possible(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, Scheme(4, 32))
    config = json.loads((folder.path / "config.json").read_text()) | {"model_type": "novel"}
    (folder.path / "config.json").write_text(json.dumps(config))
    report = verify(folder.path)
    assert report.ok
    assert any("'novel' is unknown here" in check.detail for check in report.checks)


def test_formats_that_are_not_read_are_a_notice(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify(tmp_path)
    assert report.ok
    assert any("quantization: not checked" in notice and "'hqq'" in notice for notice in report.notices)


def test_absence_of_parity_is_a_notice_where_nobody_asked_or_nobody_could_write_it(tmp_path: Path) -> None:
    foreign, ours = (write_quantized(tmp_path / name, Scheme(4, 32)) for name in ("foreign", "ours"))
    write_manifest(ours)
    assert verify(ours.path).ok
    report = verify(foreign.path, source=foreign.path, level="parity")
    assert any(notice.startswith("parity: ") for notice in report.notices)
    [failed] = [check for check in verify(ours.path, level="parity").checks if not check.ok]
    assert failed.name == "parity" and "was not scored through the runtime" in failed.detail


def parity(found: object, passed: object = True) -> dict[str, object]:
    compared = {"largest_logprob_difference": found, "greedy_agreement": 1.0, "kl": 0.0}
    return {"exact_to_transformers": compared, "bounds": {"logprob": 0.001}, "passed": passed}


@pytest.mark.parametrize(
    ("record", "ok"),
    [
        (parity(0.0), True),
        (parity(1e-6), True),
        (parity(1e-6, passed=False), False),
        (parity(0.01), False),
        (parity(None), False),
        (parity(1e-6, passed="yes"), False),
        ({"passed": True}, False),
        ([], False),
    ],
)
def test_a_record_of_parity_counts(tmp_path: Path, record: Any, ok: bool) -> None:
    folder = write_quantized(tmp_path, Scheme(4, 32))
    write_manifest(folder, parity=record)
    assert verify(folder.path, level="parity").ok == ok


def test_the_report_as_data(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    data = json.loads(json.dumps(verify(tmp_path).as_dict()))
    assert data["ok"] is True
    assert {"name", "ok", "detail", "seconds"} == set(data["checks"][0])


def test_wrong_calls() -> None:
    with pytest.raises(UsageError, match="no such folder"):
        verify("/nowhere")
    with pytest.raises(UsageError, match="unknown level"):
        verify(".", level="deep")


@pytest.mark.parametrize("place", [-1, 9], ids=["values", "header"])
def test_every_damaged_file_is_named_at_once(tmp_path: Path, place: int) -> None:
    """Also where a damaged header keeps the rest from being read."""
    folder = write_quantized(tmp_path / "artifact", Scheme(4, 32), dtype=torch.bfloat16, shards=True, tied=True)
    (folder.path / "tokenizer.json").write_text("{}")
    write_manifest(folder)
    shards = sorted(folder.path.glob("*.safetensors"))
    assert len(shards) > 1
    for path in [*shards, folder.path / "tokenizer.json"]:
        data = bytearray(path.read_bytes())
        data[place if path in shards else 0] ^= 255
        path.write_bytes(data)
    detail = failed(verify(folder.path, level="integrity"))["contents"]
    assert all(name in detail for name in [*(path.name for path in shards), "tokenizer.json"]), detail
    assert "config.json" not in detail


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """300 single flips, spread over every file and the manifest itself: none passes, none raises."""
    folder = write_quantized(
        tmp_path / "artifact", Scheme(4, 32), dtype=torch.bfloat16, shards=True, tied=True, layers=1, ffn=64
    )
    write_manifest(folder)
    (folder.path / "tokenizer.json").write_text("{}")
    write_manifest(folder)
    assert verify(folder.path, level="integrity").ok
    files = sorted(folder.path.iterdir())
    chooser = random.Random(0)
    for turn in range(300):
        path = files[turn % len(files)]
        data = bytearray(path.read_bytes())
        place = chooser.randrange(len(data) * 8)
        data[place // 8] ^= 1 << place % 8
        broken = tmp_path / "broken"
        shutil.copytree(folder.path, broken)
        (broken / path.name).write_bytes(data)
        report = verify(broken, level="integrity", threads=1)
        shutil.rmtree(broken)
        assert not report.ok, f"bit {place} of {path.name}"


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A 96 MB shard is mapped, not loaded."""
    model = {"model.embed_tokens.weight": torch.ones(96, 64)}
    big = {f"extra.{index}": torch.ones(1 << 20) for index in range(24)}
    save_file(model | big, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel"}))
    before = anonymous_bytes()
    assert verify(tmp_path, threads=1).ok
    assert anonymous_bytes() - before < 48 << 20


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"])
def test_sizes_left_out_of_a_config_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_hidden_layers")
    sizes = sizes_of({"model_type": family} | {name: getattr(config, name) for name in needed})
    assert sizes["kv_heads"] == config.num_key_value_heads
    assert sizes["head_dim"] == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert sizes["experts"] == (getattr(config, "num_experts", None) or 1)


def test_the_length_of_a_header_is_no_pickle(tmp_path: Path) -> None:
    length = (0x280).to_bytes(8, "little")  # begins as pickles of protocol 2 do
    (tmp_path / "model.safetensors").write_bytes(length + b"{}".ljust(0x280))
    assert check_names(tmp_path) == "1 files"
    for name, start in (("model.safetensors", b"\x80\x02}q\x00."), ("tokenizer.json", length + b"{}".ljust(0x280))):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ArtifactError, match="is a pickle or an archive under another name"):
            check_names(tmp_path)
        (tmp_path / name).unlink()
