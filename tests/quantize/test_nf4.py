"""NF4 against bitsandbytes: its codes and scales; runs whose artifacts transformers and our runtime load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from transformers import AutoModelForCausalLM

from compress.core.checkpoint import Checkpoint
from compress.core.compatibility import preflight
from compress.core.errors import RecipeError, UsageError
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.grid import Clip, fit_grid
from compress.core.recipe import Recipe, parse_recipe
from compress.core.scheme import Scheme
from compress.core.verify import verify
from compress.export_artifact import export_artifact
from compress.pipeline import RunOptions, plan, run
from runtime.llm import LLM
from tests.conftest import TinyModel
from tests.quantized_folders import tiny_llama

NF4 = Scheme(4, 64, dtype="nf4")
double = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def recipe_of(place: Path, *, export: dict[str, str] | None = None, **settings: Any) -> Recipe:
    data: dict[str, Any] = {"model": "model", "stages": [{"quantize": {"method": "nf4"} | settings}]}
    return parse_recipe(data | ({} if export is None else {"export": export}), base_folder=place)


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel) -> Path:
    shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    return tmp_path


# ---------------------------------------------------------------------- codes and scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [64, 128])
def test_codes_and_scales_are_the_librarys(dtype: torch.dtype, block: int) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :block] = 0
    weight[1, 3] = 30.0
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    tensor = fit_grid(weight.float(), Scheme(4, block, dtype="nf4"), scale_dtype=dtype).round(weight)
    assert torch.equal(tensor.scale.float().view(-1), state.absmax)
    theirs = torch.stack((packed >> 4, packed & 15), dim=1).view(96, 256)
    assert torch.equal(tensor.stored(), theirs)
    assert torch.equal(tensor.dequantize(dtype), functional.dequantize_4bit(packed, state))


def test_numbers_between_two_levels_go_where_the_library_puts_them() -> None:
    levels = functional.get_4bit_type("nf4", device="cpu")
    weight = torch.zeros(1, 64)
    weight[0, :16], weight[0, 16:31] = levels, (levels[1:] + levels[:-1]) / 2
    packed, _ = functional.quantize_4bit(weight, quant_type="nf4")
    tensor = fit_grid(weight, NF4, scale_dtype=torch.float32).round(weight)
    assert torch.equal(tensor.stored().view(-1), torch.stack((packed >> 4, packed & 15), dim=1).view(-1))


def test_searched_scales_have_less_error() -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0

    def errors(clip: Clip | None) -> torch.Tensor:
        tensor = fit_grid(weight, NF4, scale_dtype=torch.bfloat16, clip=clip).round(weight)
        return (tensor.dequantize() - weight).square().view(-1, 64).sum(-1)

    searched, plain = errors(Clip()), errors(None)
    assert float(searched.sum()) < 0.9 * float(plain.sum())
    assert float(searched[0]) == 0


# ---------------------------------------------------------------------- runs
@double
def test_a_run_writes_what_readers_take(place: Path, double: bool) -> None:
    recipe = recipe_of(place, double_quantization=double)
    planned = plan(recipe, RunOptions(place / "out"))
    run(recipe, RunOptions(place / "out"))
    artifact, source = Checkpoint.open(place / "out"), Checkpoint.open(place / "model")
    assert sum(info.bytes for info in artifact.tensors.values()) == planned.bytes_out
    report = verify(place / "out", source=place / "model", library=True)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert "agrees on" in next(check.detail for check in report.checks if check.name == "library")
    settings = artifact.config["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes" and settings["bnb_4bit_use_double_quant"] is double
    assert "format: bitsandbytes" in (place / "out" / "recipe.yaml").read_text()
    assert "(with `bitsandbytes` installed)" in (place / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(place / "out", device_map="cpu")
    for module in artifact.schemes:
        theirs = model.get_submodule(module).weight
        assert theirs.quant_state.dtype == torch.bfloat16 and theirs.quant_state.nested is double
        packed, _ = functional.quantize_4bit(source.tensor(f"{module}.weight"), quant_type="nf4")
        assert torch.equal(theirs.data, packed)
        assert torch.equal(
            functional.dequantize_4bit(theirs.data, theirs.quant_state), artifact.weight(module, torch.bfloat16)
        )


@double
def test_the_runtime_and_transformers_say_what_the_dequantized_model_says(tmp_path: Path, double: bool) -> None:
    tiny_llama(ffn=192).save_pretrained(tmp_path / "model")
    run(recipe_of(tmp_path, double_quantization=double), RunOptions(tmp_path / "out"))
    prompt = list(range(3, 19))
    dense = Checkpoint.open(tmp_path / "out").build_model(torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    with torch.no_grad():
        found, expected = (model(torch.tensor([prompt])).logits for model in (theirs, dense))
        assert float((found - expected).norm() / expected.norm()) < 1e-2  # bf16 products where the CPU has them
        wanted = dense.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    with LLM(tmp_path / "out", numerics="exact") as llm:
        assert list(llm.generate([prompt], max_tokens=24, ignore_eos=True)[0].token_ids) == wanted


@double
@pytest.mark.parametrize("blocks", [1, 2])
def test_broken_off_and_started_again_it_ends_with_the_same_bytes(place: Path, double: bool, blocks: int) -> None:
    recipe = recipe_of(place, double_quantization=double)
    run(recipe, RunOptions(place / "whole"))

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and event.done == blocks:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(recipe, RunOptions(place / "out"), stop)
    run(recipe, RunOptions(place / "out"))
    for path in (place / "whole").iterdir():
        assert sha256_file(path) == sha256_file(place / "out" / path.name), path.name


def test_an_export_gives_the_same_bytes_again(place: Path) -> None:
    run(recipe_of(place, double_quantization=True, clip="mse"), RunOptions(place / "out"))
    again = export_artifact(place / "out", place / "again", "bitsandbytes").folder
    for path in (place / "out").glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((place / "out" / "config.json").read_text())


def test_transformers_has_no_place_for_experts() -> None:
    schemes = {"model.layers.0.mlp.experts.3.up_proj": NF4}
    found = {verdict.engine: verdict for verdict in preflight(schemes, {}, "bitsandbytes")}
    assert found["transformers"].ok == "no" and "experts" in found["transformers"].sentence
    assert found["compress"].ok == "yes"


def test_verify_notices_where_the_library_reads_other_values(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe_of(place), RunOptions(place / "out"))
    real = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: real(*given) * 2)
    failed = [check for check in verify(place / "out", library=True).checks if not check.ok]
    assert [check.name for check in failed] == ["library"] and "reads other values" in failed[0].detail


# ---------------------------------------------------------------------- recipes
def test_the_format_follows_from_the_method(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert recipe.export.format == recipe.stage_format == "bitsandbytes"
    assert parse_recipe(recipe.model_dump(mode="json"), base_folder=tmp_path) == recipe
    assert recipe_of(tmp_path, export={}).export.format == "bitsandbytes"


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_another_format_is_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(RecipeError, match=f"{format} does not hold the weights that nf4 makes") as caught:
        recipe_of(tmp_path, export={"format": format})
    assert caught.value.hint == "these do: bitsandbytes"


def test_bitsandbytes_does_not_hold_whole_numbers() -> None:
    data = {"model": "m", "stages": [{"quantize": {"method": "rtn"}}], "export": {"format": "bitsandbytes"}}
    with pytest.raises(RecipeError, match="bitsandbytes does not hold the weights that rtn makes"):
        parse_recipe(data)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "w4a16"}, "nf4 alone"),
        ({"overrides": [{"layers": "*.v_proj", "scheme": "w8a16"}]}, "nf4 alone; others make w8a16"),
        ({"overrides": [{"layers": "x", "scheme": "w8a16"}], "double_quantization": True}, "nf4 alone"),
        ({"overrides": [{"layers": "*.v_proj", "scheme": "fp8"}]}, "methods for fp8 are rtn and fp8"),
        ({"group_size": 16}, "group_size 16 is no block of bitsandbytes"),
        ({"group_size": -1}, "group_size -1 is no block"),
        ({"symmetric": False}, "no zero points"),
        ({"uneven": "channel"}, "uneven"),
        ({"head": "nf4"}, "expect head and embedding as they are"),
        ({"prepare": [{"rotate": {}}]}, "does not compose with transforms"),
        ({"double_quantization": 1}, "true or false"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(tmp_path, **settings)


def test_other_methods_name_the_one_for_nf4() -> None:
    data = {"model": "m", "stages": [{"quantize": {"method": "hqq", "scheme": "nf4"}}]}
    with pytest.raises(RecipeError, match="whole numbers; methods for nf4 are nf4"):
        parse_recipe(data)


def test_widths_that_blocks_do_not_divide_are_refused_before_work_or_left_alone(tmp_path: Path) -> None:
    tiny_llama(ffn=160).save_pretrained(tmp_path / "model")
    with pytest.raises(
        UsageError, match=r"does not divide the width of 2 layers, e\.g\. model.layers.0.mlp.down_proj"
    ) as caught:
        plan(recipe_of(tmp_path), RunOptions(tmp_path / "out"))
    assert caught.value.hint == "sizes that work: 32; or leave these layers as they are: ignore"
    assert not (tmp_path / "out.partial").exists()
    for settings in ({"ignore": ["*.down_proj"]}, {"group_size": 32}):
        run(recipe_of(tmp_path, **settings), RunOptions(tmp_path / "out", fresh=True))
        ids = torch.arange(3, 19)[None]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
        ours = Checkpoint.open(tmp_path / "out").build_model(torch.float32)
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)


def test_one_size_of_blocks_for_all_layers(place: Path) -> None:
    recipe = recipe_of(place, overrides=[{"layers": "*.down_proj", "group_size": 128}])
    with pytest.raises(Exception, match="one group size for all layers"):
        plan(recipe, RunOptions(place / "out"))
