"""The compatibility table, and the answers that it gives."""

import subprocess
import sys
from pathlib import Path

import pytest

from compress.core.compatibility import Verdict, markdown, preflight, table, unwritable
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


def test_it_needs_no_torch() -> None:
    code = "import sys, compress.core.compatibility as c; c.table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
