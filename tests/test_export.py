"""`compress export`: the same weights in another format, verified, or a refusal that says what would work."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from compress import export_artifact as exporting
from compress.core.checkpoint import Checkpoint
from compress.core.errors import CompressError, InputError, UsageError
from compress.core.manifest import MANIFEST_NAME
from compress.core.scheme import Scheme
from compress.core.verify import verify
from compress.export import rewrite
from compress.export_artifact import export_artifact
from tests.conftest import TinyModel
from tests.quantized_folders import tiny_llama, write_quantized

W4 = Scheme(4, 32)


@pytest.fixture(scope="module")
def w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of symmetric 4-bit groups, bf16, as another tool might have left it: without a manifest."""
    folder = tmp_path_factory.mktemp("export") / "w4"
    write_quantized(folder, W4, tied=True, dtype=torch.bfloat16, shards=True)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in fp32, dequantized, by the name of the original tensor."""
    source = Checkpoint.open(folder)
    found = {f"{module}.weight": source.weight(module, torch.float32) for module in source.schemes}
    from compress.core.formats import stored_modules

    stored = stored_modules(source)
    return found | {name: source.tensor(name).float() for name in source.tensors if name not in stored}


def require_equal(one: Path, other: Path) -> None:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_weights_are_the_same_and_the_folder_is_verified(w4: Path, tmp_path: Path, format: str) -> None:
    done = export_artifact(w4, tmp_path / "out", format)
    require_equal(w4, done.folder)
    report = verify(done.folder, source=None, level="coverage")
    assert report.ok, [check for check in report.checks if not check.ok]
    config = json.loads((done.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format
    assert format in (done.folder / "README.md").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_there_and_back_gives_the_same_bytes(w4: Path, tmp_path: Path) -> None:
    first = export_artifact(w4, tmp_path / "a", "compressed-tensors").folder
    gptq = export_artifact(first, tmp_path / "b", "gptq").folder
    again = export_artifact(gptq, tmp_path / "c", "compressed-tensors").folder
    assert not (again / "quantize_config.json").exists()
    for shard in first.glob("*.safetensors"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()
    assert json.loads((first / "config.json").read_text()) == json.loads((again / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16"])
def test_small_floats_are_written_again_as_they_are(tmp_path: Path, tiny_model: TinyModel, scheme: str) -> None:
    from compress.core.recipe import parse_recipe
    from compress.pipeline import RunOptions, run

    stages = [{"quantize": {"method": "rtn", "scheme": scheme}}]
    first = run(parse_recipe({"model": str(tiny_model()), "stages": stages}), RunOptions(tmp_path / "first")).artifact
    again = export_artifact(first, tmp_path / "again", "compressed-tensors").folder
    for shard in first.glob("*.safetensors"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()


def test_awq_comes_back_with_zero_points_in_the_middle(w4: Path, tmp_path: Path) -> None:
    awq = export_artifact(w4, tmp_path / "awq", "awq").folder
    assert {scheme.symmetric for scheme in Checkpoint.open(awq).schemes.values()} == {False}
    require_equal(w4, export_artifact(awq, tmp_path / "back", "compressed-tensors").folder)


def test_lineage_and_figures_are_carried(w4: Path, tmp_path: Path) -> None:
    first = export_artifact(w4, tmp_path / "a", "gptq").folder
    second = export_artifact(first, tmp_path / "b", "awq").folder
    one, other = (json.loads((folder / MANIFEST_NAME).read_text()) for folder in (first, second))
    assert other["lineage"]["sha256"] == one["lineage"]["sha256"] != other["lineage"]["exported_from"]
    assert other["coverage"] == one["coverage"]


def test_the_same_export_gives_the_same_bytes(w4: Path, tmp_path: Path) -> None:
    one, other = (export_artifact(w4, tmp_path / name / "out", "gptq").folder for name in "ab")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_layers_that_differ(tmp_path: Path) -> None:
    def scheme(module: str) -> Scheme | None:
        if module.endswith("down_proj"):
            return Scheme(8, -1)
        return None if module.endswith("layers.1.self_attn.o_proj") else W4

    write_quantized(tmp_path / "mixed", scheme, dtype=torch.bfloat16)
    require_equal(tmp_path / "mixed", export_artifact(tmp_path / "mixed", tmp_path / "out", "gptq").folder)


def refusal(folder: Path, output: Path, format: str, **options: bool) -> CompressError:
    with pytest.raises(CompressError) as caught:
        export_artifact(folder, output, format, **options)
    assert not output.with_name(output.name + ".partial").exists()
    return caught.value


@pytest.mark.parametrize(
    ("scheme", "format", "says", "hint"),
    [
        (Scheme(4, 32, symmetric=False), "gptq", "symmetric files only", "awq"),
        (Scheme(5, 32), "gptq", "gptq does not hold w5a16", "gguf"),
        (Scheme(3, 32), "awq", "awq does not hold w3a16", "gptq"),
        (Scheme(8, 32), "awq", "awq does not hold w8a16", "gptq"),
        (Scheme(8, -1, activation_bits=8), "gptq", "gptq does not hold w8a8", "compressed-tensors"),
        (Scheme(8, -1, activation_bits=8), "gguf", "gguf does not hold w8a8", "compressed-tensors"),
        (Scheme(4, 16), "gguf", "no multiple of its blocks of 32", "gptq"),
        (W4, "bitsandbytes", "bitsandbytes", "gptq"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, scheme: Scheme, format: str, says: str, hint: str
) -> None:
    write_quantized(tmp_path / "in", scheme, dtype=torch.bfloat16)
    error = refusal(tmp_path / "in", tmp_path / "out", format)
    assert isinstance(error, InputError)
    assert error.exit_code == 3
    assert says in error.message
    assert "q_proj" in error.message or "down_proj" in error.message
    assert hint in str(error.hint)
    assert not (tmp_path / "out").exists()


def test_awq_takes_one_group_size(tmp_path: Path) -> None:
    write_quantized(tmp_path / "in", lambda module: Scheme(4, 64 if "q_proj" in module else 32), dtype=torch.bfloat16)
    assert "one group size" in refusal(tmp_path / "in", tmp_path / "out", "awq").message


def test_unknown_format(w4: Path, tmp_path: Path) -> None:
    error = refusal(w4, tmp_path / "out", "gtpq")
    assert (error.exit_code, error.where) == (2, "--format")
    assert "gptq" in str(error.hint)


def test_no_folder_and_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none", tmp_path / "out", "gptq").exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "not a model folder" in refusal(tmp_path / "empty", tmp_path / "out", "gptq").message


def test_dense_weights_are_not_quantized_on_the_way(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    assert "dense" in refusal(tmp_path / "dense", tmp_path / "out", "gptq").message


def test_a_broken_source_is_refused(w4: Path, tmp_path: Path) -> None:
    made = export_artifact(w4, tmp_path / "a", "gptq").folder
    shard = next(made.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "SHA-256" in refusal(made, tmp_path / "out", "awq").message


def test_an_output_that_exists(w4: Path, tmp_path: Path) -> None:
    made = export_artifact(w4, tmp_path / "out", "gptq").folder
    before = (made / MANIFEST_NAME).read_bytes()
    assert "output exists" in refusal(w4, made, "awq").message
    assert (made / MANIFEST_NAME).read_bytes() == before
    export_artifact(w4, made, "awq", fresh=True)
    assert "awq" in (made / "config.json").read_text()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    assert "no artifact of compress" in refusal(w4, tmp_path / "foreign", "awq", fresh=True).message
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("inside", [".", "deeper", ".."])
def test_an_output_never_touches_its_source(w4: Path, tmp_path: Path, inside: str) -> None:
    shutil.copytree(w4, tmp_path / "nest" / "w4")
    source = tmp_path / "nest" / "w4"
    error = refusal(source, (source / inside).resolve(), "gptq", fresh=True)
    assert isinstance(error, UsageError)
    assert (source / "config.json").exists()


def test_unfinished_work_is_left_alone(w4: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="unfinished work"):
        export_artifact(w4, tmp_path / "out", "gptq")
    assert (partial / "journal.jsonl").exists()


def test_what_does_not_verify_is_not_published(w4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(source: Checkpoint, staged: Path, format: str):
        files = rewrite(source, staged, format)
        shard = next(staged.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
        return files

    monkeypatch.setattr(exporting, "rewrite", spoilt)
    assert "not published" in refusal(w4, tmp_path / "out", "gptq").message
    assert not (tmp_path / "out").exists()


def test_a_writer_that_errs_is_found_out(w4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.core.formats import gptq

    honest = gptq.encode

    def wrong(module, tensor):
        parts = honest(module, tensor)
        parts[f"{module}.qweight"][0, 0] ^= 1
        return parts

    monkeypatch.setattr(gptq, "encode", wrong)
    assert "same weights" in refusal(w4, tmp_path / "out", "gptq").message


def test_a_preview_says_who_loads_it_and_writes_nothing(w4: Path, tmp_path: Path) -> None:
    shown = exporting.preview(w4, tmp_path / "out", "gptq", tensor_parallel=4)
    vllm = next(verdict for verdict in shown.verdicts if verdict.engine == "vllm")
    assert vllm.ok == "no"
    assert "groups of 32 do not divide a shard's 16 input channels" in vllm.sentence
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="one group size|does not hold"):
        write_quantized(tmp_path / "in", Scheme(8, 32), dtype=torch.bfloat16)
        exporting.preview(tmp_path / "in", tmp_path / "out", "awq")


def test_a_recipe_asks_for_a_format(tmp_path: Path, tiny_model: TinyModel) -> None:
    """The run gives the very weights that an export of its compressed-tensors result gives."""
    from compress.core.recipe import parse_recipe
    from compress.pipeline import RunOptions, run

    def made(format: str) -> tuple[Path, int]:
        stage = {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}}
        data = {"model": str(tiny_model("qwen2", dtype="bfloat16")), "stages": [stage], "export": {"format": format}}
        result = run(parse_recipe(data), RunOptions(tmp_path / format))
        return result.artifact, result.summary["plan"]["bytes"] - result.summary["artifact"]["bytes"]

    (plain, _), (gptq, missed) = made("compressed-tensors"), made("gptq")
    assert missed == 0, "the plan's bytes are exact"
    assert verify(gptq).ok
    exported = export_artifact(plain, tmp_path / "exported", "gptq").folder
    for shard in exported.glob("*.safetensors"):
        assert shard.read_bytes() == (gptq / shard.name).read_bytes()
    assert "gptq" in (gptq / "README.md").read_text()


@pytest.mark.parametrize(
    ("stage", "format", "says"),
    [
        ({"method": "rtn", "scheme": "w4a16", "group_size": 16, "symmetric": False}, "gptq", "symmetric files only"),
        ({"method": "rtn", "scheme": "w3a16", "group_size": 32}, "awq", "awq does not hold w3a16"),
    ],
)
def test_a_recipe_whose_format_cannot_hold_its_scheme_is_refused_before_work(
    stage: dict[str, object], format: str, says: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    from compress.core.recipe import parse_recipe
    from compress.pipeline import RunOptions, run

    data = {"model": str(tiny_model("qwen2", dtype="bfloat16")), "stages": [{"quantize": stage}]}
    with pytest.raises(InputError, match=says):
        run(parse_recipe({**data, "export": {"format": format}}), RunOptions(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_an_unknown_format() -> None:
    from compress.core.recipe import parse_recipe

    with pytest.raises(UsageError, match="export.format"):
        parse_recipe({"model": "x", "stages": [{"quantize": {"method": "rtn"}}], "export": {"format": "gguf"}})
