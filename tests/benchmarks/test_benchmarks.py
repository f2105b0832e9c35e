"""The benchmarks' own parts: their decoder against golden vectors, their inputs, and the refusal to run alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [-8, -7, -1, 0, 1, 2, 6, 7], [0xFEA98710]),
        (8, [-128, -1, 0, 127], [0xFF807F00]),
        (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4]),
        (3, [i % 8 - 4 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_codes_unpack_as_the_library_packs_them(bits: int, codes: list[int], words: list[int]) -> None:
    import decode

    packed = np.array([words], dtype=np.uint32).view(np.int32)
    assert (decode.unpack(packed, bits, len(codes)) - (1 << (bits - 1))).tolist() == [codes]


@pytest.mark.parametrize(("zero_offset", "zeros_word"), [(1, 0x77777777), (0, 0x88888888)])
def test_gptq_files_decode_with_either_zero(zero_offset: int, zeros_word: int) -> None:
    import decode

    codes = np.arange(8, dtype=np.uint32)  # eight input channels of each of eight output channels
    word = np.bitwise_or.reduce(codes << (4 * codes)).astype(np.uint32)
    tensors = {
        "m.qweight": np.full((1, 8), word, dtype=np.uint32).view(np.int32),
        "m.qzeros": np.full((2, 1), zeros_word, dtype=np.uint32).view(np.int32),
        "m.scales": np.array([[0.5] * 8, [2.0] * 8], dtype=np.float16),
        "m.g_idx": np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int32),
    }
    expected = (np.arange(8) - 8) * np.array([0.5] * 4 + [2.0] * 4)
    assert (decode.decode_gptq(tensors, "m", 4, zero_offset) == expected).all()


def test_models_are_equal_byte_for_byte_and_load(tmp_path: Path) -> None:
    import make_models
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = make_models.SHAPES["tiny"]
    for name in ("one", "two"):
        count = make_models.make_model(shape, tmp_path / name, seed=3)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert "model.safetensors.index.json" in files
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    text = "Ada and the hen, 12 eggs"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_scorer_agrees_with_a_plain_loop(tmp_path: Path) -> None:
    import make_models
    import perplexity
    import torch

    make_models.make_model(make_models.SHAPES["tiny"], tmp_path, seed=0)
    model = perplexity.build(tmp_path)
    ids = np.full((3, 20), -1, dtype=np.int64)
    for row, length in enumerate((20, 7, 12)):
        ids[row, :length] = np.random.default_rng(row).integers(0, 512, length)
    losses = []
    for row in ids:
        story = torch.from_numpy(row[row >= 0])
        logits = model(input_ids=story[None]).logits[0].log_softmax(-1)
        losses += [-logits[i, story[i + 1]].item() for i in range(len(story) - 1)]
    loss, count = perplexity.mean_loss(model, ids)
    assert count == len(losses)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_results_name_the_best_peer_case_by_case() -> None:
    import quality_table

    def entry(tool: str, variant: str, mean: float) -> dict[str, object]:
        case = {"model": "m", "bits": 2, "group_size": -1, "tool": tool, "method": "gptq", "variant": variant}
        return case | {"mean": mean, "perplexity": {str(seed): mean for seed in range(5)}}

    cases = [entry("compress", "default", 1.0), entry("llmcompressor", "mse", 3.0), entry("gptqmodel", "default", 2.0)]
    table = quality_table.render({"original": {"m": 0.5}, "cases": cases})
    assert "| W2 per channel | gptqmodel default 2.000 |" in table


@pytest.mark.parametrize("arguments", [["quality.py", "--data", "."], ["speed.py"]])
def test_refuses_without_the_peers(arguments: list[str], tmp_path: Path) -> None:
    script, *options = arguments
    command = [sys.executable, str(BENCHMARKS / script), "--peers", str(tmp_path), "--work", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"is not installed in {tmp_path}" in done.stderr
    assert "benchmarks/peers.sh" in done.stderr


def test_peers_stay_outside_the_repository() -> None:
    inside = BENCHMARKS / "environments"
    done = subprocess.run([BENCHMARKS / "peers.sh", inside], capture_output=True, text=True, check=False)
    assert not inside.exists()
    assert done.returncode == 2
    assert "outside" in done.stderr


def test_recipe_of_a_case_is_a_valid_recipe(tmp_path: Path) -> None:
    import runner
    import tools

    from compress.core.recipe import load_recipe

    job = runner.Job(model="a model", tokens="ids.safetensors", output="out", json="record.json", bits=3, group_size=-1)
    recipe = load_recipe(tools.write_recipe(job, 128, 250, tmp_path / "case.yaml"))
    stage = recipe.stages[0]
    assert (recipe.model, stage.method, stage.settings.scheme, stage.settings.group_size) == (
        "a model",
        "gptq",
        "w3a16",
        -1,
    )
    assert json.loads(json.dumps(recipe.calibration.dataset)).endswith("ids.safetensors")


@pytest.mark.parametrize(
    ("scheme", "method", "variant", "stage"),
    [
        ("weights", "awq", "asymmetric", ("awq", "w3a16", False, ())),
        ("weights", "hqq", "default", ("hqq", "w3a16", True, ())),
        ("w8a8", "gptq", "default", ("gptq", "w8a8", True, ())),
        ("w8a8", "smoothquant", "default", ("gptq", "w8a8", True, ("smoothquant",))),
        ("fp8", "rtn", "default", ("fp8", "fp8", True, ())),
    ],
)
def test_recipes_of_every_method_are_valid(
    scheme: str, method: str, variant: str, stage: tuple[object, ...], tmp_path: Path
) -> None:
    import runner
    import tools

    from compress.core.recipe import load_recipe

    job = runner.Job("m", "ids.safetensors", "out", "r.json", 3, 32, method, variant, scheme=scheme)
    [made] = load_recipe(tools.write_recipe(job, 128, 250, tmp_path / "case.yaml")).stages
    settings = made.settings
    transforms = tuple(name for each in settings.prepare for name in each.model_dump())
    assert (made.method, settings.scheme, settings.symmetric, transforms) == stage


def test_every_e4m3_byte_means_what_torch_says() -> None:
    import decode
    import torch

    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(decode.E4M3, expected, equal_nan=True)


@pytest.mark.parametrize("type", ["int", "float"])
def test_inputs_are_rounded_per_token_before_every_layer_but_the_head(type: str, tmp_path: Path) -> None:
    import make_models
    import perplexity
    import torch

    make_models.make_model(make_models.SHAPES["tiny"], tmp_path, seed=0)
    model = perplexity.build(tmp_path)
    inputs = {"num_bits": 8, "type": type, "strategy": "token", "dynamic": True, "symmetric": True}
    perplexity.round_inputs(model, {"config_groups": {"group_0": {"input_activations": inputs}}})
    layer, given = model.model.layers[0].mlp.up_proj, torch.randn(3, model.config.hidden_size)
    given[0] *= 100
    codes = (given / (given.abs().amax(-1, keepdim=True) / perplexity.LARGEST[type])).double()
    codes = codes.round() if type == "int" else codes.float().to(torch.float8_e4m3fn).double()
    meant = (codes * (given.abs().amax(-1, keepdim=True).double() / perplexity.LARGEST[type])).float()
    assert torch.allclose(layer(given), torch.nn.functional.linear(meant, layer.weight), atol=1e-5)
    assert not torch.allclose(layer(given), torch.nn.functional.linear(given, layer.weight), atol=1e-5)
    assert torch.equal(model.lm_head(given), torch.nn.functional.linear(given, model.lm_head.weight))
    with pytest.raises(ValueError, match="per token alone"):
        perplexity.round_inputs(
            model, {"config_groups": {"group_0": {"input_activations": inputs | {"dynamic": False}}}}
        )


def test_drift_is_nothing_for_the_same_model_and_a_mean_over_positions_else(tmp_path: Path) -> None:
    import make_models
    import perplexity
    import torch

    for seed in (0, 1):
        make_models.make_model(make_models.SHAPES["tiny"], tmp_path / str(seed), seed=seed)
    original, other = (perplexity.build(tmp_path / str(seed)) for seed in (0, 1))
    ids = np.full((2, 9), -1, dtype=np.int64)
    ids[0], ids[1, :4] = range(9), range(20, 24)
    assert perplexity.drift(original, original, ids) == (0, 0)
    expected, flipped = [], []
    for row in (ids[0], ids[1, :4]):
        p, q = (m(input_ids=torch.from_numpy(row)[None]).logits[0, :-1].softmax(-1) for m in (original, other))
        expected += (p * (p / q).log()).sum(-1).tolist()
        flipped += (p.argmax(-1) != q.argmax(-1)).tolist()
    assert np.mean(flipped) > 0
    assert perplexity.drift(other, original, ids) == pytest.approx((np.mean(expected), np.mean(flipped)), rel=1e-4)


def quantize_results() -> dict[str, object]:
    def case(tool: str, method: str, kl: float, seed: int = 0) -> dict[str, object]:
        sizes = {"seconds": 5.0, "seconds_after_imports": 2.0, "peak_rss_anon_bytes": 3e8, "bytes": 1e6 + 1e6 * kl}
        named = {"model": "m", "scheme": "w4-g32", "method": method, "tool": tool, "variant": "default", "seed": seed}
        return named | {"perplexity": 10 + kl, "kl": kl} | sizes

    failed = case("autoround", "autoround", 0.3)
    failed = {name: failed[name] for name in ("model", "scheme", "method", "tool", "variant", "seed")}
    cases = [case("compress", "gptq", 0.1), case("compress", "gptq", 0.3, 1), case("llmcompressor", "gptq", 0.4)]
    original = {"perplexity": 10.0, "bytes": 4_000_000}
    return {"original": {"m": original}, "cases": [*cases, failed | {"failure": "it refused"}]}


def test_the_table_of_methods_has_means_and_failures() -> None:
    import quantization_table

    table = quantization_table.render(quantize_results()).splitlines()
    assert "| w4-g32 | gptq | compress | **10.200** | 0.2000 | 5 | 300 MB | 1.20 MB |" in table
    assert "| w4-g32 | gptq | llmcompressor | 10.400 | 0.4000 | 5 | 300 MB | 1.40 MB |" in table
    assert "| w4-g32 | autoround | autoround | failed | | | | |" in table


def test_every_tool_and_scheme_is_in_the_picture_and_equal_figures_give_equal_bytes(tmp_path: Path) -> None:
    import quantization_plot
    import quantization_table

    [path] = quantization_plot.draw(quantize_results(), tmp_path)
    picture = path.read_text()
    for words in ("w4-g32", "gptq", "compress (this project)", "llmcompressor", "KL divergence"):
        assert words in picture, words
    entries = [entry for entry in quantization_table.means(quantize_results()) if "failure" not in entry]
    [axes] = quantization_plot.picture("m", entries).axes
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left < entry["bytes"] / 1e6 < right and low < entry["kl"] < high for entry in entries)
    assert right < 3 * left and high < 10 * low
    [again] = quantization_plot.draw(quantize_results(), tmp_path)
    assert again.read_text() == picture


def test_no_script_hides_a_package_of_the_project() -> None:
    """A script's own folder comes first on its path: `benchmarks/quantize.py` would be taken for `quantize`."""
    packages = {path.parent.name for path in BENCHMARKS.parent.glob("*/__init__.py")}
    assert "quantize" in packages
    assert not packages & {path.stem for path in BENCHMARKS.glob("*.py")}
