"""GGUF: blocks against readings by hand and by the gguf package, the container, names, rotary rows, tokenizers."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.core._verify_gguf import check_gguf
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, CompressError, InputError, UsageError
from compress.core.formats import _gguf_blocks as blocks
from compress.core.formats import _gguf_container as container
from compress.core.formats import _gguf_reader as reading
from compress.core.formats import gguf
from compress.core.formats._gguf_model import FAMILIES, rope_factors, rotary_rows, tensor_name
from compress.core.formats._gguf_tokenizer import tokenizer_metadata
from compress.core.formats._gguf_types import BY_NAME, F32, Q4_0, Q4_K, Q6_K, Q8_0
from compress.core.scheme import Scheme
from compress.export_artifact import export_artifact
from tests.conftest import TinyModel
from tests.quantized_folders import write_quantized

TYPES = sorted(BY_NAME)


def awkward() -> torch.Tensor:
    """[40, 512]: noise, and rows that searches stumble over."""
    weight = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0] = 0
    weight[1], weight[2] = 0.01, -0.01
    weight[3, :300] = 0
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs()
    weight[6, 7] = 8
    weight[7] *= 1e-6
    weight[8] *= 1e5
    return weight


# ---------------------------------------------------------------------- blocks


@pytest.mark.peer
@pytest.mark.parametrize("name", TYPES)
def test_the_gguf_package_reads_the_same_bits(name: str) -> None:
    peer = pytest.importorskip("gguf", reason="needs the package gguf")
    written = blocks.quantize(awkward(), BY_NAME[name]).numpy()
    theirs = peer.quants.dequantize(written, peer.GGMLQuantizationType(BY_NAME[name].id)).astype(np.float32)
    ours = reading.decode(written.reshape(-1), name).reshape(theirs.shape)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(
    ("name", "largest"), [("f16", 3e-4), ("bf16", 2e-3), ("q8_0", 6e-3), ("q6_k", 2e-2), ("q4_k", 8e-2), ("q4_0", 9e-2)]
)
def test_rounding_error_of_noise(name: str, largest: float) -> None:
    weight = awkward()[9:]
    found = reading.decode(blocks.quantize(weight, BY_NAME[name]).numpy().reshape(-1), name)
    error = np.linalg.norm(found - weight.numpy().reshape(-1)) / float(weight.norm())
    assert error < largest


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "q6_k"])
def test_awkward_rows_stay_finite_and_near(name: str) -> None:
    weight = awkward()
    found = reading.decode(blocks.quantize(weight, BY_NAME[name]).numpy().reshape(-1), name).reshape(weight.shape)
    assert np.isfinite(found).all()
    assert not found[0].any()
    for row in (1, 2, 3, 4, 5, 8):
        assert np.linalg.norm(found[row] - weight[row].numpy()) <= 0.12 * float(weight[row].norm()), row


def test_blocks_do_not_depend_on_their_neighbours() -> None:
    weight = awkward()
    for type in (Q4_0, Q8_0, Q4_K, Q6_K):
        alone = torch.cat([blocks.quantize(row[None], type) for row in weight])
        assert torch.equal(blocks.quantize(weight, type), alone), type.name


def half(octets: bytes) -> float:
    return struct.unpack("<e", octets)[0]


def q4_k_by_hand(block: bytes) -> list[float]:
    """Value by value, from the page that describes the layout."""
    scales, found = block[4:16], []
    for index in range(256):
        sub = index // 32
        if sub < 4:
            scale, low = scales[sub] & 63, scales[sub + 4] & 63
        else:
            scale = scales[sub + 4] & 15 | (scales[sub - 4] >> 6) << 4
            low = scales[sub + 4] >> 4 | (scales[sub] >> 6) << 4
        octet = block[16 + index // 64 * 32 + index % 32]
        code = octet >> 4 if index % 64 >= 32 else octet & 15
        found.append(half(block[:2]) * scale * code - half(block[2:4]) * low)
    return found


def q6_k_by_hand(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    found = []
    for index in range(256):
        part, row, column = index // 128, index % 128 // 32, index % 32
        octet = low[part * 64 + row % 2 * 32 + column]
        nibble = octet >> 4 if row >= 2 else octet & 15
        code = (nibble | (high[part * 32 + column] >> 2 * row & 3) << 4) - 32
        found.append(half(block[208:]) * scales[index // 16] * code)
    return found


@pytest.mark.parametrize(("type", "by_hand"), [(Q4_K, q4_k_by_hand), (Q6_K, q6_k_by_hand)])
def test_k_blocks_by_hand(type: Any, by_hand: Any) -> None:
    octets = np.random.default_rng(0).integers(0, 256, (8, type.bytes_each), dtype=np.uint8)
    places = {Q4_K: (0, 2), Q6_K: (208,)}[type]
    for place in places:  # halves that are numbers
        octets[:, place : place + 2] = np.random.default_rng(1).normal(0, 1, (8, 1)).astype("<f2").view(np.uint8)
    wanted = np.array([by_hand(bytes(block)) for block in octets], np.float32)
    assert np.allclose(reading.decode(octets.reshape(-1), type.name).reshape(8, 256), wanted, rtol=1e-6, atol=1e-6)


def test_small_blocks_by_hand() -> None:
    x = (torch.arange(256.0) - 128)[None] / 16
    assert bytes(blocks.quantize(x, Q8_0)[0, :10].tolist()).hex() == "082c8182838485868788"
    codes = torch.arange(32, dtype=torch.int8)[None] % 16 - 8
    stored = blocks.from_codes(codes, torch.tensor([[0.5]], dtype=torch.float16), Q4_0)
    assert bytes(stored[0].tolist()).hex() == "0038" + "".join(f"{digit:x}{digit:x}" for digit in range(16))


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="no multiple of the blocks of q4_k"):
        blocks.quantize(torch.zeros(2, 128), Q4_K)


# ---------------------------------------------------------------------- container


def small_file(path: Path) -> bytes:
    """Two tensors and one value of each kind."""
    value = torch.arange(6.0).view(2, 3)
    tensors = [
        container.Tensor("a", F32, (2, 3), lambda: value.numpy().tobytes() and memoryview(value.numpy().tobytes())),
        container.Tensor("b", F32, (3,), lambda: memoryview(value[0].numpy().tobytes())),
    ]
    metadata = {
        "general.architecture": container.text("llama"),
        "tokenizer.ggml.model": container.text("none"),
        "number": container.u32(7),
        "float": container.f32(0.5),
        "truth": container.flag(True),
        "names": container.texts(["ä", ""]),
        "numbers": container.i32s([-1, 2]),
        "floats": container.f32s([0.25]),
    }
    path.write_bytes(b"".join(bytes(piece) for piece in container.pieces(metadata, tensors)))
    return path.read_bytes()


def test_the_container_is_read_back(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    metadata, tensors = container.read(tmp_path / "m.gguf")
    assert metadata["names"] == ["ä", ""]
    assert (metadata["number"], metadata["float"], metadata["truth"]) == (7, 0.5, True)
    assert (metadata["numbers"], metadata["floats"]) == ([-1, 2], [0.25])
    assert tensors["a"].shape == (2, 3)
    assert tensors["b"].start % container.ALIGNMENT == 0
    assert reading.values(tmp_path / "m.gguf", tensors["a"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "2 tensors" in check_gguf(tmp_path / "m.gguf")


@pytest.mark.peer
def test_the_gguf_package_reads_the_container(tmp_path: Path) -> None:
    peer = pytest.importorskip("gguf", reason="needs the package gguf")
    small_file(tmp_path / "m.gguf")
    found = peer.GGUFReader(tmp_path / "m.gguf")
    assert found.fields["names"].contents() == ["ä", ""]
    assert {tensor.name: tensor.data.tolist() for tensor in found.tensors} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [0, 1, 2],
    }


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = small_file(tmp_path / "m.gguf")
    last = container.read(tmp_path / "m.gguf")[1]["b"]
    for length in range(0, last.start + last.bytes, 7):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            check_gguf(tmp_path / "cut.gguf")


def test_a_file_changed_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    data = bytearray(small_file(tmp_path / "m.gguf"))
    for place in range(len(data)):
        data[place] ^= 0xFF
        (tmp_path / "changed.gguf").write_bytes(data)
        try:
            check_gguf(tmp_path / "changed.gguf")
        except CompressError as error:
            assert len(str(error)) < 1000
        data[place] ^= 0xFF


def test_values_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    data = bytearray(small_file(tmp_path / "m.gguf"))
    start = container.read(tmp_path / "m.gguf")[1]["a"].start
    data[start : start + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(ArtifactError, match="NaN"):
        check_gguf(tmp_path / "nan.gguf")


def test_bytes_that_were_not_announced() -> None:
    short = container.Tensor("a", F32, (4,), lambda: memoryview(bytes(12)))
    with pytest.raises(ArtifactError, match="12 bytes where 16"):
        list(container.pieces({}, [short]))


# ---------------------------------------------------------------------- the model


def test_rotary_rows_make_neighbours_of_halves() -> None:
    """Turning neighbours of the rows in the new order is turning halves of the rows in the old one."""
    config = {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}
    rows = rotary_rows("model.layers.0.self_attn.q_proj.weight", config)
    assert rows is not None
    q = torch.randn(24, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(4, generator=torch.Generator().manual_seed(1))
    cos, sin = angle.cos(), angle.sin()
    halves = q.view(3, 2, 4)
    turned = torch.stack([halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], 1)
    pairs = q[rows].view(3, 4, 2)
    theirs = torch.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1)
    assert torch.allclose(turned.reshape(-1)[rows], theirs.reshape(-1))
    keys = rotary_rows("model.layers.0.self_attn.k_proj.bias", config)
    assert keys is not None and keys.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert rotary_rows("model.layers.0.self_attn.v_proj.weight", config) is None
    assert rotary_rows("model.layers.0.self_attn.q_proj.weight", config | {"model_type": "qwen2"}) is None


def test_rope_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors({"hidden_size": 128, "num_attention_heads": 1, "rope_parameters": rope})
    assert factors is not None
    plain = 500000.0 ** -(torch.arange(64) / 64)
    assert torch.allclose(plain / factors, wanted, rtol=1e-5)
    assert 1 == factors.min() < factors.max() == 8


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_are_written_and_read_back(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = without_window(tiny_model(family), tmp_path / "in")
    done = export_artifact(folder, tmp_path / "out", "gguf")
    metadata, tensors = container.read(done.folder / "model.gguf")
    assert metadata["general.architecture"] == FAMILIES[family].name
    source = Checkpoint.open(folder)
    assert ("output.weight" in tensors) == (not source.tied)
    queries = reading.values(done.folder / "model.gguf", tensors["blk.1.attn_q.weight"])
    original = source.tensor("model.layers.1.self_attn.q_proj.weight").float().numpy()
    assert np.array_equal(queries, original) != FAMILIES[family].pairs
    assert np.array_equal(np.sort(queries, axis=0), np.sort(original, axis=0))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_other_families_are_refused_by_name(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{family} models are not written as gguf"):
        export_artifact(tiny_model(family), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def without_window(folder: Path, copy: Path) -> Path:
    """The tiny models slide their windows, which llama.cpp's llama does not."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    return copy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "computes silu"),
        ({"sliding_window": 8}, "no sliding window of 8"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "'yarn'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    change: dict[str, Any], says: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = without_window(tiny_model("llama"), tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=says):
        gguf.layout(Checkpoint.open(folder))


def test_a_tensor_without_a_name() -> None:
    with pytest.raises(InputError, match="no name in gguf"):
        tensor_name("model.layers.0.mlp.experts.0.w1.weight")


# ---------------------------------------------------------------------- quantized models


@pytest.mark.parametrize(
    ("scheme", "type"),
    [
        (Scheme(4, 32), "q4_0"),
        (Scheme(4, 64), "q4_0"),
        (Scheme(4, -1), "q4_0"),
        (Scheme(3, 32), "q4_0"),
        (Scheme(2, 32), "q4_0"),
        (Scheme(8, 32), "q8_0"),
        (Scheme(6, -1), "q8_0"),
        (Scheme(4, 32, symmetric=False), "q8_0"),
    ],
)
def test_codes_are_carried_over(scheme: Scheme, type: str, tmp_path: Path) -> None:
    made = write_quantized(tmp_path / "in", scheme, dtype=torch.bfloat16)
    planned = gguf.layout(Checkpoint.open(made.path))
    assert {t.type.name for t in planned.tensors if t.name.startswith("blk.") and len(t.shape) == 2} == {type}
    assert len(planned.exact) == len(planned.tensors)
    file = export_artifact(made.path, tmp_path / "out", "gguf").folder / "model.gguf"
    tensors = container.read(file)[1]
    down = made.modules["model.layers.1.mlp.down_proj"].dequantize().numpy()
    assert np.array_equal(reading.values(file, tensors["blk.1.ffn_down.weight"]), down)


def test_scales_beyond_half_precision_need_leave(tmp_path: Path) -> None:
    write_quantized(tmp_path / "in", Scheme(4, 32), dtype=torch.float32)
    with pytest.raises(InputError, match="not exact in fp16") as caught:
        export_artifact(tmp_path / "in", tmp_path / "out", "gguf")
    assert "--requantize" in str(caught.value.hint)
    done = export_artifact(tmp_path / "in", tmp_path / "out", "gguf", requantize=True)
    source = Checkpoint.open(tmp_path / "in")
    wanted = source.weight("model.layers.0.mlp.up_proj", torch.float32)
    file = done.folder / "model.gguf"
    found = reading.values(file, container.read(file)[1]["blk.0.ffn_up.weight"])
    assert np.linalg.norm(found - wanted.numpy()) < 1e-3 * float(wanted.norm())
    assert "rounded anew" in (done.folder / "README.md").read_text()


def test_another_type_needs_leave(tmp_path: Path) -> None:
    write_quantized(tmp_path / "in", Scheme(4, 32), dtype=torch.bfloat16)
    with pytest.raises(InputError, match="codes are those of q4_0, not of q8_0"):
        export_artifact(tmp_path / "in", tmp_path / "out", "gguf", type="q8_0")
    export_artifact(tmp_path / "in", tmp_path / "out", "gguf", type="q8_0", requantize=True)


def test_types_that_do_not_fit_a_row_fall_back_with_a_notice(tiny_model: TinyModel, tmp_path: Path) -> None:
    done = export_artifact(tiny_model("llama"), tmp_path / "out", "gguf", type="q4_k")
    assert "stored as q8_0 instead of q4_k" in done.notices[0]


def test_options_of_gguf_are_of_gguf_alone(tmp_path: Path) -> None:
    for options in ({"type": "q8_0"}, {"requantize": True}):
        with pytest.raises(UsageError, match="gguf alone"):
            export_artifact(tmp_path, tmp_path / "out", "gptq", **options)


def test_an_unknown_type(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown type 'q5_x'") as caught:
        export_artifact(tiny_model("llama"), tmp_path / "out", "gguf", type="q5_x")
    assert "q4_k" in str(caught.value.hint)


def test_a_writer_that_errs_is_found_out(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = blocks.quantize
    monkeypatch.setattr(blocks, "quantize", lambda weight, type: honest(weight, type).flip(0))
    with pytest.raises(ArtifactError, match="same weights"):
        export_artifact(tiny_model("llama"), tmp_path / "out", "gguf", type="q8_0")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- tokenizers


def byte_level(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "<x>", "special": False}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        },
        **changes,
    }


def words(**changes: Any) -> dict[str, Any]:
    return {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "▁a": 4},
            "merges": ["▁ a"],
        },
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        **changes,
    }


def described(folder: Path, data: dict[str, Any] | None, **config: Any) -> dict[str, Any]:
    if data is not None:
        (folder / "tokenizer.json").write_text(json.dumps(data))
    found = tokenizer_metadata(folder, {"vocab_size": 6, **config})
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in found.items()}


def test_byte_level_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ x }}"}))
    found = described(tmp_path, byte_level(), eos_token_id=[2, 0])
    assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
    assert found["tokens"] == ["a", "b", "ab", "<s>", "<x>", "[PAD5]"]
    assert found["token_type"] == [1, 1, 1, 3, 4, 5]
    assert found["merges"] == ["a b"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (3, 2)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == "{{ x }}"


def test_word_tokenizers(tmp_path: Path) -> None:
    found = described(tmp_path, words())
    assert (found["model"], found["add_space_prefix"]) == ("llama", True)
    assert found["token_type"] == [2, 6, 1, 1, 1, 5]
    assert found["scores"][4] == max(found["scores"]) == 0
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    assert not described(tmp_path, words(normalizer=None, pre_tokenizer=metaspace))["add_space_prefix"]


def test_no_tokenizer(tmp_path: Path) -> None:
    assert described(tmp_path, None) == {"model": "no_vocab"}


QWEN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
LLAMA = QWEN.replace("\\p{N}| ?", "\\p{N}{1,3}| ?")


@pytest.mark.parametrize(
    ("first", "regex", "name"),
    [
        ({"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}, False, "qwen2"),
        (
            {
                "type": "Split",
                "pattern": {"Regex": QWEN.replace("\\p{N}| ?", "\\p{N}{1,3}| ?")},
                "behavior": "Isolated",
            },
            False,
            "llama-bpe",
        ),
        ({"type": "Digits", "individual_digits": True}, True, "smollm"),
    ],
)
def test_rules_of_splitting(first: dict[str, Any], regex: bool, name: str, tmp_path: Path) -> None:
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}
    rule = {"type": "Sequence", "pretokenizers": [first, last]}
    assert described(tmp_path, byte_level(pre_tokenizer=rule))["pre"] == name


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (byte_level(pre_tokenizer={"type": "Whitespace"}), "no rule that splits text"),
        (byte_level(pre_tokenizer=None), "no rule that splits text"),
        (byte_level(normalizer={"type": "Lowercase"}), "normalize"),
        (byte_level(model={"type": "Unigram", "vocab": []}), "Unigram"),
        (byte_level(added_tokens=[{"id": 6, "content": "<far>"}]), "no row in the embedding"),
        (words(normalizer={"type": "NFKC"}), "treats spaces"),
        (words(pre_tokenizer={"type": "ByteLevel"}), "treats spaces"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(data: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        described(tmp_path, data)
    assert "tokenizer.json" in str(caught.value.where)


def test_a_tokenizer_in_another_file_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(InputError, match="only a tokenizer.json"):
        described(tmp_path, None)
