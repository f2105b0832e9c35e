"""compressed-tensors: golden vectors, round trips, and the real library as the judge of what we write."""

from pathlib import Path

import pytest
import torch

from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.formats import compressed_tensors as ct
from compress.core.formats import reader_for
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from tests.quantized_folders import tiny_llama, write_quantized

SCHEMES = [
    Scheme(bits, size, symmetric=symmetric) for bits in range(2, 9) for size in (32, -1) for symmetric in (True, False)
] + [
    Scheme(8, -1, activation_bits=8),
    Scheme(8, -1, symmetric=False, activation_bits=8),
    Scheme(4, 32, activation_bits=8),
]
W4 = Scheme(4, 32)


def label(scheme: Scheme) -> str:
    return f"{scheme.name}-g{scheme.group_size}-{'sym' if scheme.symmetric else 'asym'}"


def random_tensor(scheme: Scheme, rows: int = 20, width: int = 96, dtype: torch.dtype = torch.float32) -> QuantTensor:
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = scheme.groups_in(width)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (rows, width), generator=generator).to(torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).to(dtype)
    zero = torch.randint(scheme.lowest, scheme.highest + 1, (rows, groups), generator=generator).to(torch.int8)
    return QuantTensor.from_codes(codes, scale, None if scheme.symmetric else zero, scheme)


def packed_words(codes: list[int], bits: int) -> list[int]:
    tensor = QuantTensor.from_codes(torch.tensor([codes], dtype=torch.int8), torch.ones(1, 1), None, Scheme(bits))
    return [word & 0xFFFFFFFF for word in ct.encode("m", tensor)["m.weight_packed"][0].tolist()]


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        ([-8, -7, -1, 0, 1, 2, 6, 7], 4, [0xFEA98710]),
        ([-128, -1, 0, 127], 8, [0xFF807F00]),
        ([-2, -1, 0, 1] * 4, 2, [0xE4E4E4E4]),
        ([i % 8 - 4 for i in range(32)], 3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_packs_the_golden_vectors(codes: list[int], bits: int, words: list[int]) -> None:
    assert packed_words(codes, bits) == words


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize(("rows", "width"), [(20, 96), (33, 70), (1, 64)])
def test_reads_what_it_writes(scheme: Scheme, rows: int, width: int) -> None:
    if scheme.group_size > 0 and width % scheme.group_size:
        width = 96
    tensor = random_tensor(scheme, rows, width, torch.bfloat16)
    stored = ct.encode("m", tensor)
    again = ct.decode("m", stored.__getitem__, scheme)
    assert torch.equal(again.codes(), tensor.codes())
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert set(stored) == set(ct.stored_names("m", scheme))
    assert stored["m.weight_scale"].dtype == torch.bfloat16
    assert all(value.is_contiguous() for value in stored.values())
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert size == ct.encoded_bytes((rows, width), scheme, torch.bfloat16)


def test_modules_are_found_by_their_tensors() -> None:
    stored = ct.encode("a.q_proj", random_tensor(W4)) | ct.encode("b", random_tensor(Scheme(8, -1, activation_bits=8)))
    assert ct.modules_of([*stored, "norm.weight"]) == ["a.q_proj", "b"]


# ---------------------------------------------------------------------- the config
@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_the_config_says_the_scheme(scheme: Scheme) -> None:
    config = ct.quantization_config({"model.layers.0.q_proj": scheme}, ["lm_head"])
    assert ct.scheme_of("model.layers.7.v_proj", config) == scheme
    assert ct.scheme_of("lm_head", config) is None


def test_the_config_is_minimal() -> None:
    config = ct.quantization_config({"model.layers.0.a": Scheme(4, 64)}, ["lm_head"])
    assert config == {
        "quant_method": "compressed-tensors",
        "version": "0.18.0",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "dynamic": False,
                    "group_size": 64,
                },
            }
        },
        "ignore": ["lm_head"],
    }


def test_several_schemes_get_a_group_each_with_exact_names() -> None:
    schemes = {"layers.10.down": Scheme(4, -1), "layers.2.down": Scheme(4, -1), "layers.2.up": W4, "x": W4, "y": W4}
    config = ct.quantization_config(schemes, ["lm_head", "a"])
    assert [group["targets"] for group in config["config_groups"].values()] == [
        ["layers.2.up", "x", "y"],
        ["layers.2.down", "layers.10.down"],
    ]
    assert config["ignore"] == ["a", "lm_head"]
    assert {name: ct.scheme_of(name, config) for name in schemes} == schemes
    assert ct.scheme_of("layers.20.down", config) is None


def test_packed_and_plain_int8_together_are_mixed_precision() -> None:
    schemes = {"a": W4, "b": Scheme(8, -1, activation_bits=8)}
    config = ct.quantization_config(schemes, [])
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    assert {name: ct.scheme_of(name, config) for name in schemes} == schemes


def test_nothing_quantized_has_no_config() -> None:
    with pytest.raises(UsageError, match="no module is quantized"):
        ct.quantization_config({}, [])


def config_with(**weights: object) -> dict[str, object]:
    config = ct.quantization_config({"a": W4}, ["lm_head"])
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


@pytest.mark.parametrize(
    ("target", "module", "is_match"),
    [
        ("Linear", "model.layers.0.q_proj", True),
        ("re:.*q_proj$", "model.layers.0.q_proj", True),
        ("re:q_proj", "model.layers.0.q_proj", False),  # patterns match at the start
        ("model.layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.0.q_proj", "model.layers.0.q_proj", False),
        ("LlamaAttention", "model.layers.0.q_proj", False),
    ],
)
def test_targets_of_other_tools(target: str, module: str, is_match: bool) -> None:
    config = config_with()
    config["config_groups"]["group_0"]["targets"] = [target]
    assert (ct.scheme_of(module, config) is not None) == is_match


def test_an_exact_name_beats_a_pattern_beats_a_class() -> None:
    config = config_with()
    group = config["config_groups"]["group_0"]
    config["config_groups"] = {
        f"group_{bits}": group | {"targets": [target], "weights": group["weights"] | {"num_bits": bits}}
        for bits, target in ((4, "Linear"), (3, "re:.*down"), (8, "x.down"))
    }
    bits = [ct.scheme_of(name, config).bits for name in ("x.down", "y.down", "x.up")]
    assert bits == [8, 3, 4]


def test_what_llm_compressor_writes_is_read() -> None:
    config = config_with(
        actorder="static", observer="memoryless_minmax", observer_kwargs={}, scale_dtype=None, zp_dtype=None,
        block_structure=None,
    )  # fmt: skip
    config |= {"kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}}
    assert ct.scheme_of("a", config) == W4


def test_presets_are_read() -> None:
    config = config_with()
    config["config_groups"] = {"W4A16_ASYM": ["Linear"]}
    assert ct.scheme_of("a", config) == Scheme(4, 128, symmetric=False)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 9}, "num_bits 9"),
        ({"num_bits": "4"}, "num_bits '4'"),
        ({"type": "float"}, "float4 weights"),
        ({"strategy": "block"}, "strategy 'block'"),
        ({"strategy": "group", "group_size": None}, "positive group_size"),
        ({"strategy": "channel"}, "contradicts strategy channel"),
        ({"group_size": 0}, "group_size 0"),
        ({"actorder": "group"}, "actorder 'group'"),
        ({"actorder": True}, "actorder True"),
        ({"symmetric": "yes"}, "symmetric 'yes'"),
        ({"dynamic": True}, "dynamic weights"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_weights_that_are_not_read_are_named(weights: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ct.scheme_of("a", config_with(**weights))
    assert "config_groups.group_0" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mxfp8-quantized"}, "mxfp8-quantized"),
        ({"format": "zip"}, "'zip'"),
        ({"quantization_status": "initialized"}, "initialized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"NVFP4": ["Linear"]}}, "NVFP4"),
        ({"config_groups": {"group_0": {"targets": "Linear"}}}, "targets"),
        ({"ignore": "lm_head"}, "ignore"),
        ({"ignore": ["re:("]}, "not a valid pattern"),
    ],
)
def test_configs_that_are_not_read_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ct.scheme_of("a", config_with() | changes)


@pytest.mark.parametrize("method", ["aqlm", "modelopt", "fp8", "nonsense"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(InputError, match=method):
        reader_for({"quantization_config": {"quant_method": method}})


# ---------------------------------------------------------------------- tensors that do not fit
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight_packed", lambda value: value[:, :-1]),
        ("weight_packed", lambda value: value.to(torch.int64)),
        ("weight_scale", lambda value: value[:, :-1]),
        ("weight_scale", lambda value: value.to(torch.int32)),
        ("weight_shape", lambda value: value + torch.tensor([1, 0])),
        ("weight_shape", lambda value: torch.tensor([20, 1 << 40])),
        ("weight_shape", lambda value: value[:1]),
        ("weight_zero_point", lambda value: value[:-1]),
        ("weight_zero_point", lambda value: value.to(torch.int8)),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, change) -> None:
    scheme = Scheme(4, 32, symmetric=False)
    stored = ct.encode("m", random_tensor(scheme))
    stored[f"m.{name}"] = change(stored[f"m.{name}"])
    with pytest.raises(ArtifactError) as caught:
        ct.decode("m", stored.__getitem__, scheme)
    assert name in str(caught.value) or name == "weight_shape"


# ---------------------------------------------------------------------- the real library
@pytest.mark.peer
@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_reads_the_same_weights(scheme: Scheme, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    width = 96 if scheme.group_size > 0 else 70
    tensor = random_tensor(scheme, 20, width, dtype)
    config = QuantizationConfig.model_validate(ct.quantization_config({"m": scheme}, ["lm_head"]))
    stored = {name.removeprefix("m."): value for name, value in ct.encode("m", tensor).items()}
    compressor = BaseCompressor.get_value_from_registry(config.format)
    theirs = compressor.decompress(stored, config.config_groups["group_0"])["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, tensor.dequantize(dtype))


def transformers_logits(folder: Path, *, dequantize: bool) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.arange(32)[None] + 3).logits


def largest_difference(folder, *, dequantize: bool, **shape: object) -> float:
    """Of logits: the folder opened by transformers, against a dense model with the weights that we mean."""
    reference = tiny_llama(**shape)
    reference.load_state_dict({name: value.float() for name, value in folder.dequantized().items()}, strict=False)
    with torch.no_grad():
        wanted = reference(torch.arange(32)[None] + 3).logits
    return float((transformers_logits(folder.path, dequantize=dequantize) - wanted).abs().max())


def uneven(module: str) -> Scheme:
    return Scheme(4, -1) if module.endswith("down_proj") else W4


def more_bits(module: str) -> Scheme:
    return Scheme(8, 32) if module.endswith("down_proj") else W4


# Measured: exactly 0 in fp32 on the same machine; the bound leaves room for another order of summation.
LOGITS_BOUND = 1e-5


FP8 = Scheme(8, -1, dtype="fp8", activation_bits=8)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("schemes", "shape"),
    [
        (W4, {}),
        (W4, {"tied": True}),
        (Scheme(4, 32, symmetric=False), {}),
        (Scheme(3, -1), {"ffn": 70}),
        (Scheme(2, 32), {}),
        (Scheme(8, -1, activation_bits=8), {}),
        (FP8, {}),
        (Scheme(8, -1, dtype="fp8"), {"tied": True}),
        (uneven, {}),
        (lambda module: None if module.endswith("o_proj") else W4, {}),
    ],
    ids=["w4", "tied", "asymmetric", "w3-odd", "w2", "w8a8", "fp8", "fp8a16", "uneven", "some-kept"],
)
def test_transformers_computes_the_same_logits(tmp_path: Path, schemes, shape: dict[str, object]) -> None:
    pytest.importorskip("compressed_tensors")
    folder = write_quantized(tmp_path, schemes, **shape)
    assert largest_difference(folder, dequantize=True, **shape) < LOGITS_BOUND


@pytest.mark.peer
def test_facts_about_transformers_in_the_compatibility_table(tmp_path: Path) -> None:
    """If this fails, transformers has changed: read compatibility.yaml again."""
    pytest.importorskip("compressed_tensors")
    mixed = write_quantized(tmp_path / "mixed", more_bits)
    assert largest_difference(mixed, dequantize=False) < LOGITS_BOUND
    assert largest_difference(mixed, dequantize=True) > 0.01  # the first group's bits for all layers: silently wrong
    asymmetric = write_quantized(tmp_path / "asymmetric", Scheme(4, 32, symmetric=False))
    with pytest.raises(RuntimeError):
        transformers_logits(asymmetric.path, dequantize=False)
