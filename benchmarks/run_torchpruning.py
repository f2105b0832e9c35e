"""Prune feed-forward channels with Torch-Pruning, to be run by the Python of its own environment.

    PEER_PYTHON benchmarks/run_torchpruning.py --jobs JOBS

Its importance by the size of weights, over the group of layers that its dependency graph finds (gate, up, down).
"""

import time

_STARTED = time.perf_counter()

import runner  # noqa: E402
import torch  # noqa: E402
import torch_pruning  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

BARE_BYTES = runner.rss_anon_bytes()
IMPORTED_S = time.perf_counter() - _STARTED


def quantize(job: runner.Job) -> None:
    if (job.method, job.pattern) != ("magnitude", "channels"):
        raise ValueError(f"Torch-Pruning: {job.method} of {job.pattern} is not compared")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    ratios: dict[nn.Module, float] = {}
    ignored: list[nn.Module] = [model.lm_head]
    for layer in model.model.layers:
        ratios |= {layer.mlp.gate_proj: job.sparsity, layer.mlp.up_proj: job.sparsity}
        attention = layer.self_attn
        ignored += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp.down_proj]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.arange(1, 33).view(1, -1),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=ignored,
        global_pruning=False,
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    model.save_pretrained(job.output)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.output)


def main() -> None:
    versions = {
        "torch-pruning": torch_pruning.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    imported = {"bytes_after_bare_imports": BARE_BYTES, "seconds_of_imports": IMPORTED_S}
    runner.run_jobs(runner.parse_jobs(("default",)), quantize, imported, versions)


if __name__ == "__main__":
    main()
