"""A run.json made by hand, as complete as a real one, for tests of what is rendered from it."""

import math
from typing import Any

SITES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

FALLBACK = "it saw 12 tokens, fewer than 2 per input channel (576)"


def sample_run(*, blocks: int = 8, model: str = "HuggingFaceTB/SmolLM2-135M", bits: int = 4) -> dict[str, Any]:
    """The run of a small Llama with GPTQ; block 2 has a fallback, block 5 a retry, the head is kept."""
    layers, records = [], []
    for block in range(blocks):
        sites = []
        for number, site in enumerate(SITES):
            name = f"model.layers.{block}.{site}"
            error = 0.002 * (1 + 0.4 * math.sin(block + number)) * (2 + number / 3) * 2 ** (2 * (4 - bits))
            fallback = FALLBACK if (block, number) == (2, 6) else ""
            retries = 1 if (block, number) == (5, 0) else 0
            layers.append(
                {
                    "name": name,
                    "bits": bits,
                    "group_size": 64,
                    "symmetric": True,
                    "scheme": f"w{bits}a16",
                    "shape": [576, 576],
                    "reason": "",
                    "bytes_in": 663552,
                    "bytes_out": 165888 + 10368,
                }
            )
            sites.append(
                {
                    "name": name,
                    "method": "rtn" if fallback else "gptq",
                    "bits": bits,
                    "group_size": 64,
                    "error": error,
                    "damping": 0.1 if retries else 0.01,
                    "retries": retries,
                    "fallback": fallback,
                    "tokens": 16384,
                }
            )
        output = 0.004 * (1 + block / 3) * 2 ** (2 * (4 - bits))
        records.append({"index": block, "name": f"model.layers.{block}", "output_error": output, "sites": sites})
    layers.append(
        {
            "name": "lm_head",
            "bits": None,
            "group_size": None,
            "symmetric": None,
            "scheme": None,
            "shape": [49152, 576],
            "reason": "the head is kept",
            "bytes_in": 56623104,
            "bytes_out": 56623104,
        }
    )
    return {
        "schema_version": 1,
        "recipe": {
            "model": model,
            "calibration": {"dataset": "wikitext", "field": "text", "samples": 128, "length": 2048, "seed": 0},
            "stages": [{"quantize": {"method": "gptq", "scheme": f"w{bits}a16", "group_size": 64}}],
            "export": {"format": "compressed-tensors"},
        },
        "source": {
            "id": model,
            "revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
            "bytes": 269_060_552,
            "parameters": 134_515_008,
        },
        "artifact": {
            "path": "/nowhere",
            "bytes": 118_204_416 * (3 + bits) // 7,
            "bits_per_weight": 7.0299 * (3 + bits) / 7,
            "format": "compressed-tensors",
        },
        "stages": [
            {
                "kind": "quantize",
                "method": "gptq",
                "settings": {"scheme": f"w{bits}a16", "group_size": 64, "damping": 0.01},
                "seconds": 312.4,
                "peak_memory_bytes": 861_000_000,
                "blocks": records,
                "layers": layers,
            }
        ],
        "evaluation": sample_evaluation(bits),
        "notices": ["asymmetric artifacts load in transformers only with dequantize=True"],
        "fallbacks": [
            {"where": "model.layers.2.mlp.down_proj", "reason": FALLBACK},
            {"where": "model.layers.5.self_attn.q_proj", "reason": "damping was raised once, to 0.1"},
        ],
        "plan": {
            "bytes": 118_204_416,
            "artifact_bytes": 121_000_000,
            "peak_memory_bytes": 900_000_000,
            "disk_bytes": 240_000_000,
            "minutes": 6.0,
        },
        "measured": {
            "bytes": 118_204_416,
            "artifact_bytes": 121_044_112,
            "peak_memory_bytes": 861_000_000,
            "minutes": 7.4,
        },
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "numpy": "2.4.6",
            "cpu": "a CPU",
            "cores": 2,
            "threads": 2,
            "platform": "Linux",
            "gpu": None,
        },
        "gate": {"asked": {"max_perplexity_increase": 0.05}, "failures": []},
        "lineage": {
            "source": model,
            "revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
            "licence": "apache-2.0",
            "bytes": 269_060_552,
            "parameters": 134_515_008,
            "sha256": {"model.safetensors": "ab" * 32, "config.json": "cd" * 32},
        },
    }


def sample_evaluation(bits: int = 4) -> dict[str, Any]:
    worse = 0.021 * 4 ** (4 - bits)
    accuracy = {
        "original": 0.4312,
        "artifact": 0.4312 - worse / 2,
        "difference": -worse / 2,
        "interval": [-0.021 - worse / 2, 0.006 - worse / 2],
        "stderr": {"original": 0.0157, "artifact": 0.0156},
        "n": 1000,
    }
    return {
        "schema_version": 1,
        "protocol": {
            "through": "transformers",
            "seed": 0,
            "dtype": "auto",
            "text": {
                "text": "wikitext",
                "field": "text",
                "split": "test",
                "documents": "end to end",
                "documents_read": 4358,
                "window": 2048,
                "stride": 1024,
                "special_tokens": "auto",
                "prefix": "",
                "windows": 271,
                "tokens_scored": 287_644,
                "text_bytes": 1_290_590,
                "token_sha256": "ef" * 32,
            },
            "tasks": {
                "lm_eval": "0.4.13",
                "limit": 1000,
                "chat_template": False,
                "tasks": {"hellaswag": {"fewshot": 0, "version": 1.0, "documents": 1000, "request_sha256": "12" * 32}},
            },
        },
        "perplexity": {
            "original": 15.6224,
            "artifact": 15.6224 * (1 + worse),
            "increase": worse,
            "interval": [worse - 0.003, worse + 0.003],
        },
        "bits_per_byte": {"original": 0.88333, "artifact": 0.88333 + worse / 3},
        "kl": {"mean": 0.0291 * worse / 0.021, "p99": 0.31, "interval": [0.027, 0.0312]},
        "flips": {"share": 0.0843, "interval": [0.0812, 0.0876]},
        "tasks": {
            "hellaswag": {
                "acc": accuracy,
                "acc_norm": {
                    **accuracy,
                    "original": 0.4312,
                    "artifact": 0.4322,
                    "difference": 0.001,
                    "interval": [-0.01, 0.012],
                },
            }
        },
        "notices": ["tasks were limited to 1000 documents each: figures are not comparable with others'"],
    }
