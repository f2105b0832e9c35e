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
