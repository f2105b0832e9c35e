"""The compatibility table, and the answers that it gives."""

import subprocess
import sys
from pathlib import Path

import pytest

from compress.core.compatibility import (
    Verdict,
    as_written,
    formats_for,
    formats_markdown,
    markdown,
    preflight,
    refusals,
    table,
    unwritable,
)
from compress.core.scheme import Scheme

W4 = Scheme(4, 128)


def verdict(engine: str, scheme: Scheme = W4, shape: tuple[int, int] = (1024, 1024), **options: int) -> Verdict:
    name = "model.layers.0.mlp.down_proj"
    return next(found for found in preflight({name: scheme}, {name: shape}, **options) if found.engine == engine)


def test_every_engine_says_its_version_and_evidence() -> None:
    assert [engine.name for engine in table().engines] == ["vllm", "sglang", "transformers", "llama.cpp", "compress"]
    for found, engine in zip(preflight({"a": W4}, {"a": (128, 128)}), table().engines, strict=True):
        assert found.engine == engine.name
        assert engine.label in found.sentence
        assert engine.evidence in found.sentence


@pytest.mark.parametrize(
    ("engine", "scheme", "ok"),
    [
        ("vllm", W4, "yes"),
        ("vllm", Scheme(4, 128, symmetric=False), "yes"),
        ("vllm", Scheme(8, -1, activation_bits=8), "yes"),
        ("vllm", Scheme(8, 128, activation_bits=8), "no"),
        ("vllm", Scheme(8, 128, symmetric=False), "with-conditions"),
        ("vllm", Scheme(4, 16), "with-conditions"),
        ("vllm", Scheme(3, 128), "with-conditions"),
        ("sglang", W4, "yes"),
        ("sglang", Scheme(3, 128), "no"),
        ("sglang", Scheme(4, 16), "no"),
        ("sglang", Scheme(8, -1, activation_bits=8), "yes"),
        ("transformers", W4, "yes"),
        ("transformers", Scheme(2, 128), "yes"),
        ("transformers", Scheme(3, 128), "with-conditions"),
        ("transformers", Scheme(4, 128, symmetric=False), "with-conditions"),
        ("llama.cpp", W4, "no"),
        ("compress", W4, "yes"),
    ],
)
def test_verdicts(engine: str, scheme: Scheme, ok: str) -> None:
    assert verdict(engine, scheme).ok == ok


def test_asymmetric_names_what_transformers_needs() -> None:
    assert "dequantize=True" in verdict("transformers", Scheme(4, 128, symmetric=False)).sentence


def test_dense_packing_names_the_version_it_needs() -> None:
    assert "0.18" in verdict("transformers", Scheme(5, 128)).sentence


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_ragged_groups_load_nowhere(engine: str) -> None:
    found = verdict(engine, W4, (64, 192))
    assert found.ok == "no"
    assert "groups of 128 do not divide its 192 input channels" in found.sentence
    assert "mlp.down_proj" in found.sentence


def test_groups_must_divide_a_shard() -> None:
    assert verdict("vllm", W4, (1024, 384)).ok == "yes"
    assert "a shard's 192 input channels" in verdict("vllm", W4, (1024, 384), tensor_parallel=2).sentence
    assert "cannot be split over 3 shards" in verdict("vllm", W4, (1024, 1024), tensor_parallel=3).sentence


def test_sglang_wants_whole_tiles_but_not_for_w8a8() -> None:
    assert "no multiple of 64" in verdict("sglang", W4, (96, 128)).sentence
    assert verdict("sglang", Scheme(8, -1, activation_bits=8), (96, 96)).ok == "yes"


def test_fused_layers_must_share_a_scheme() -> None:
    block = "model.layers.3.self_attn"
    schemes = {f"{block}.q_proj": W4, f"{block}.k_proj": W4, f"{block}.v_proj": Scheme(8, 128)}
    shapes = dict.fromkeys(schemes, (1024, 1024))
    verdicts = {found.engine: found for found in preflight(schemes, shapes)}
    assert verdicts["vllm"].ok == "no"
    assert f"{block}: q_proj, k_proj, v_proj" in verdicts["vllm"].sentence
    assert verdicts["transformers"].ok == "with-conditions"
    assert "silently wrong" in verdicts["transformers"].sentence


def test_mixed_and_asymmetric_does_not_load_in_transformers() -> None:
    schemes = {"a": Scheme(4, 128, symmetric=False), "b": Scheme(8, 128, symmetric=False)}
    found = next(v for v in preflight(schemes, dict.fromkeys(schemes, (128, 128))) if v.engine == "transformers")
    assert found.ok == "no"


def test_uneven_group_sizes_load_in_transformers() -> None:
    schemes = {"a": W4, "b": Scheme(4, -1)}
    found = next(v for v in preflight(schemes, {"a": (128, 128), "b": (128, 96)}) if v.engine == "transformers")
    assert found.ok == "yes"


def test_what_can_be_written() -> None:
    assert unwritable(W4, (64, 256)) is None
    assert unwritable(Scheme(4, -1), (64, 77)) is None
    assert "do not divide its 192" in str(unwritable(W4, (64, 192)))


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "artifact-format.md"
    assert markdown() in page.read_text(encoding="utf-8")


def test_the_page_of_formats_shows_its_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    assert formats_markdown() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("scheme", "shape", "formats"),
    [
        (W4, (1024, 1024), ["compressed-tensors", "gptq", "awq", "gguf"]),
        (Scheme(4, 128, symmetric=False), (1024, 1024), ["compressed-tensors", "awq", "gguf"]),
        (Scheme(3, 32), (1024, 1024), ["compressed-tensors", "gptq", "gguf"]),
        (Scheme(3, 20), (60, 60), ["compressed-tensors"]),
        (Scheme(4, -1), (12, 32), ["compressed-tensors", "gguf"]),
        (Scheme(8, -1, activation_bits=8), (64, 64), ["compressed-tensors"]),
        (Scheme(4, 64, dtype="nf4"), (64, 64), ["bitsandbytes"]),
        (Scheme(4, 64, dtype="nf4"), (64, 96), []),
        (Scheme(8, -1, dtype="fp8"), (64, 64), ["compressed-tensors"]),
        (W4, (64, 192), []),
    ],
)
def test_which_formats_can_be_written(scheme: Scheme, shape: tuple[int, int], formats: list[str]) -> None:
    assert formats_for({"layer": scheme}, {"layer": shape}) == formats
    for format in table().formats:
        assert bool(refusals({"layer": scheme}, {"layer": shape}, format)) == (format not in formats)


def test_one_group_size_and_a_dense_head() -> None:
    shapes = {"a": (64, 128), "lm_head": (64, 128)}
    assert "one group size" in refusals({"a": W4, "b": Scheme(4, 64)}, {"a": (64, 128), "b": (64, 128)}, "awq")["a"]
    assert "not quantized" in refusals({"a": W4, "lm_head": W4}, shapes, "awq")["lm_head"]
    assert not refusals({"a": W4, "lm_head": W4}, shapes, "gptq")


def test_awq_is_found_with_zero_points() -> None:
    assert not as_written({"a": W4}, "awq")["a"].symmetric
    assert as_written({"a": W4}, "gptq")["a"].symmetric


@pytest.mark.parametrize(
    ("format", "engine", "scheme", "ok"),
    [
        ("gptq", "vllm", W4, "yes"),
        ("gptq", "vllm", Scheme(4, 16), "with-conditions"),
        ("gptq", "vllm", Scheme(3, 32), "no"),
        ("gptq", "sglang", Scheme(8, 32), "yes"),
        ("gptq", "sglang", Scheme(4, 16), "no"),
        ("awq", "vllm", Scheme(4, 64, symmetric=False), "yes"),
        ("gguf", "llama.cpp", W4, "yes"),
        ("gguf", "vllm", W4, "no"),
        ("gguf", "compress", W4, "no"),
        ("bitsandbytes", "vllm", Scheme(4, 64, dtype="nf4"), "no"),
    ],
)
def test_verdicts_by_format(format: str, engine: str, scheme: Scheme, ok: str) -> None:
    found = {v.engine: v for v in preflight({"layer": scheme}, {"layer": (1024, 1024)}, format)}
    assert found[engine].ok == ok


def test_it_needs_no_torch() -> None:
    code = "import sys, compress.core.compatibility as c; c.table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
