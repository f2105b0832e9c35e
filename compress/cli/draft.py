"""`recipes init`: reads the sizes in a model's headers and chooses the most precise scheme that fits a budget."""

import json
import math
import re
from dataclasses import dataclass

from compress.core.errors import UsageError
from compress.core.quantities import format_bytes
from compress.core.scheme import Scheme

CHOICES = (Scheme(8, 128), Scheme(6, 128), Scheme(5, 128), Scheme(4, 32), Scheme(4, 64), Scheme(4, 128), Scheme(3, 64),
           Scheme(3, 128), Scheme(2, 64))  # fmt: skip
"""From the most precise to the smallest."""

_NOTES = {
    8: "8 bits: close to the original in every measurement we made.",
    6: "6 bits: hardly to be told from the original; fewer engines read it than 4 or 8 bits.",
    5: "5 bits: hardly to be told from the original; fewer engines read it than 4 or 8 bits.",
    4: "4 bits: the usual choice.",
    3: "3 bits: expect a visible loss; measure it, and read the report.",
    2: "2 bits: expect a large loss. Consider a smaller model at 4 bits instead.",
}


@dataclass(frozen=True)
class Sizes:
    """Elements of the linear layers in the blocks (by input width), bytes of all else, parameters in all."""

    layers: dict[tuple[int, int], int]
    other_bytes: int
    parameters: int

    def bytes_under(self, scheme: Scheme) -> int:
        """Bytes of the weights under `scheme`: codes, scales of two bytes, and all that stays as it is."""
        import torch

        from compress.core.formats.compressed_tensors import encoded_bytes

        quantized = sum(count * encoded_bytes(shape, scheme, torch.bfloat16) for shape, count in self.layers.items())
        return quantized + self.other_bytes

    def fits(self, scheme: Scheme) -> bool:
        """Whether the group size divides every width."""
        return all(width % scheme.group_size == 0 for _, width in self.layers)


def draft_recipe(model: str, budget_bytes: int | None, *, offline: bool = False) -> tuple[str, str]:
    """The text of a recipe for `model`, and one line that says what was chosen and why. Downloads only the model."""
    sizes = read_sizes(model, offline=offline)
    scheme = choose(sizes, budget_bytes)
    after = sizes.bytes_under(scheme)
    size = f"{format_bytes(after)}, {8 * after / sizes.parameters:.2f} bits per weight"
    choice = f"{scheme.name} in groups of {scheme.group_size}: {size}"
    return _text(model, scheme, size, budget_bytes), choice


def read_sizes(model: str, *, offline: bool) -> Sizes:
    """Sizes from the headers of a checkpoint."""
    from compress.core.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model, offline=offline)
    layers: dict[tuple[int, int], int] = {}
    quantized_bytes = 0
    for index in range(checkpoint.num_blocks):
        for name in checkpoint.sites(index):
            info = checkpoint.tensors[f"{name}.weight"]
            shape = (info.shape[0], info.shape[1])
            layers[shape] = layers.get(shape, 0) + 1
            quantized_bytes += info.bytes
    total = sum(info.bytes for info in checkpoint.tensors.values())
    return Sizes(layers, total - quantized_bytes, sum(math.prod(info.shape) for info in checkpoint.tensors.values()))


def choose(sizes: Sizes, budget_bytes: int | None) -> Scheme:
    """The most precise scheme within the budget; without a budget 4 bits. UsageError if even 2 bits are too much."""
    possible = [scheme for scheme in CHOICES if sizes.fits(scheme)]
    if not possible:
        widths = ", ".join(str(width) for _, width in sizes.layers)
        raise UsageError(f"no usual group size divides the widths of this model ({widths})", hint="group_size: -1")
    if budget_bytes is None:
        return next((scheme for scheme in possible if scheme.bits == 4), possible[-1])
    fitting = [scheme for scheme in possible if sizes.bytes_under(scheme) <= budget_bytes]
    if not fitting:
        least = sizes.bytes_under(possible[-1])
        raise UsageError(
            f"even {possible[-1].name} needs {format_bytes(least)}, more than the budget of {format_bytes(budget_bytes)}; "
            f"{format_bytes(sizes.other_bytes)} of that are embedding, head and norms, which stay as they are",
            hint="raise --budget, or choose a smaller model",
        )
    return fitting[0]


def _text(model: str, scheme: Scheme, size: str, budget_bytes: int | None) -> str:
    gate = ""
    if budget_bytes is not None:
        gate = f"\ngate: {{max_size: {budget_bytes}}}  # bytes; a larger result ends with exit code 5\n"
    return f"""\
# {scheme.name} in groups of {scheme.group_size} for {_plain(model)}. Written by `compress recipes init`.
# Predicted size of the weights: {size}.

model: {_scalar(model)}

# Text that GPTQ looks at: a hub id, a folder, .jsonl, .txt, .parquet, or token ids in .safetensors.
# Text like what the model will see in use is best.
calibration: {{dataset: wikitext, samples: 128, length: 2048}}

stages:
  # {_NOTES[scheme.bits]}
  # Smaller groups are more precise and larger; `compress run --dry-run` says by how much.
  - quantize: {{method: gptq, scheme: {scheme.name}, group_size: {scheme.group_size}}}

# Measured on the original, too, so that the report shows what the compression costs.
evaluate:
  perplexity: {{dataset: wikitext, window: 2048, stride: 1024}}
  through: transformers
{gate}"""


def _scalar(text: str) -> str:
    """`text` as a YAML value: quoted unless it is plainly a name."""
    return text if re.fullmatch(r"[A-Za-z][\w.-]*(/[A-Za-z][\w.-]*)?", text) else json.dumps(text)


def _plain(text: str) -> str:
    return " ".join(text.split())
