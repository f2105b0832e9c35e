"""transformers' own reader of GGUF, which uses the gguf package: the same logits, the same tokens."""

from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint, load_tokenizer
from compress.export_artifact import export_artifact
from tests.conftest import TinyModel
from tests.core.formats.test_gguf import without_window

TEXTS = ("Once upon a time, there were 1234 ducks.", "  Hello  World\n\n don't say é", "")

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _needs_gguf() -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")


def require_alike(folder: Path, written: Path) -> None:
    """transformers computes the same logits from the file as from the folder: rows are where they belong."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = Checkpoint.open(folder)
    # transformers takes a head's width from the file for llama, but not for qwen3
    given = {"config": AutoConfig.from_pretrained(folder)} if source.model_type == "qwen3" else {}
    theirs = AutoModelForCausalLM.from_pretrained(written, gguf_file="model.gguf", dtype=torch.float32, **given).eval()
    ours = source.build_model(torch.float32)
    size = source.config["vocab_size"]
    ids = torch.randint(0, size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_are_equal(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = without_window(tiny_model(family), tmp_path / "in")
    require_alike(folder, export_artifact(folder, tmp_path / "out", "gguf").folder)


def test_the_demo_model_and_its_tokenizer(tmp_path: Path) -> None:
    """Byte-level BPE."""
    import compress.demo

    folder = Path(compress.demo.__file__).parent / "model"
    written = export_artifact(folder, tmp_path / "out", "gguf").folder
    require_alike(folder, written)
    require_same_tokens(folder, written)


def require_same_tokens(folder: Path, written: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(written, gguf_file="model.gguf"), load_tokenizer(folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text


@pytest.mark.data
def test_a_model_with_words_and_byte_fallback(shared_data: Path, tmp_path: Path) -> None:
    """Its weights are compared; transformers rebuilds this kind of tokenizer by rules of its own, which differ."""
    folder = shared_data / "models" / "stories-7m"
    require_alike(folder, export_artifact(folder, tmp_path / "out", "gguf").folder)
