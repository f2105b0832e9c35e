"""`recipes init`: reads the sizes in a model's headers and chooses the most precise scheme that fits a budget."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from compress.core.errors import UsageError
from compress.core.places import locate
from compress.core.quantities import format_bytes
from compress.core.scheme import Scheme

_LARGE_FIRST, _SMALL_FIRST = (128, 64, 32), (32, 64, 128)
_SIZES = {8: _LARGE_FIRST, 6: _LARGE_FIRST, 5: _LARGE_FIRST, 4: _SMALL_FIRST, 3: _SMALL_FIRST, 2: _SMALL_FIRST}
CHOICES = tuple(Scheme(bits, size) for bits, sizes in _SIZES.items() for size in sizes)
"""In the order of preference: precise before small, but large groups where groups hardly matter."""

_LENGTH = 2048
_NOTES = {
    8: "8 bits: half the size, and usually hard to tell from the original.",
    6: "6 bits: usually hard to tell from the original; fewer engines read it than 4 or 8 bits.",
    5: "5 bits: a small loss; fewer engines read it than 4 or 8 bits.",
    4: "4 bits: the usual choice.",
    3: "3 bits: expect a visible loss; measure it, and read the report.",
    2: "2 bits: expect a large loss. Consider a smaller model at 4 bits instead.",
}


_MOST_INCREASE = {8: "1%", 6: "2%", 5: "3%", 4: "8%", 3: "30%", 2: "100%"}
_GATE = """
# A result that misses a bound is written, but ends with exit code 5. The scheme was chosen for the size, so it is the
# quality that may be missed: more than this is unusual at {bits} bits and asks for a larger budget.
gate:
  max_size: {budget}  # bytes of all files: the budget
  max_perplexity_increase: {increase}
"""


@dataclass(frozen=True)
class Sizes:
    """Linear layers in the blocks by shape, bytes of all other tensors and of the files beside them, parameters."""

    layers: dict[tuple[int, int], int]
    other_bytes: int
    beside_bytes: int
    parameters: int
    positions: int

    def bytes_under(self, scheme: Scheme) -> int:
        """Bytes of the weights under `scheme`: codes, scales of two bytes, and all that stays as it is."""
        import torch

        from compress.core.formats.compressed_tensors import encoded_bytes

        quantized = sum(count * encoded_bytes(shape, scheme, torch.bfloat16) for shape, count in self.layers.items())
        return quantized + self.other_bytes

    def all_bytes_under(self, scheme: Scheme) -> int:
        """Bytes of all files of an artifact."""
        return self.bytes_under(scheme) + self.beside_bytes

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
    return _text(model, scheme, size, min(sizes.positions, _LENGTH), budget_bytes), choice


def read_sizes(model: str, *, offline: bool) -> Sizes:
    """Sizes from the headers of a checkpoint."""
    from compress.core._verify_shapes import require_shapes
    from compress.core.checkpoint import Checkpoint
    from compress.planning import bytes_beside_tensors

    checkpoint = Checkpoint.open(locate(model, "model", Path.cwd()), offline=offline)
    require_shapes(checkpoint)
    layers: dict[tuple[int, int], int] = {}
    names: list[str] = []
    quantized_bytes = 0
    for index in range(checkpoint.num_blocks):
        for name in checkpoint.sites(index):
            info = checkpoint.tensors[f"{name}.weight"]
            shape = (info.shape[0], info.shape[1])
            layers[shape] = layers.get(shape, 0) + 1
            quantized_bytes += info.bytes
            names.append(name)
    total = sum(info.bytes for info in checkpoint.tensors.values())
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    positions = checkpoint.config.get("max_position_embeddings")
    beside = bytes_beside_tensors(checkpoint, names)
    return Sizes(
        layers, total - quantized_bytes, beside, parameters, positions if isinstance(positions, int) else _LENGTH
    )


def choose(sizes: Sizes, budget_bytes: int | None) -> Scheme:
    """The most precise scheme within the budget; without a budget 4 bits. UsageError if even 2 bits are too much."""
    possible = [scheme for scheme in CHOICES if sizes.fits(scheme)]
    if not possible:
        widths = ", ".join(str(width) for _, width in sizes.layers)
        raise UsageError(f"no usual group size divides the widths of this model ({widths})", hint="group_size: -1")
    if budget_bytes is None:
        return max((scheme for scheme in possible if scheme.bits == 4), key=lambda scheme: scheme.group_size)
    fitting = [scheme for scheme in possible if sizes.all_bytes_under(scheme) <= budget_bytes]
    if not fitting:
        least = sizes.all_bytes_under(possible[-1])
        raise UsageError(
            f"even {possible[-1].name} needs {format_bytes(least)}, more than the budget of "
            f"{format_bytes(budget_bytes)}; {format_bytes(sizes.other_bytes + sizes.beside_bytes)} of that "
            "stay as they are (embedding, head, norms, tokenizer)",
            hint="raise --budget, or choose a smaller model",
        )
    return fitting[0]


def _text(model: str, scheme: Scheme, size: str, length: int, budget_bytes: int | None) -> str:
    gate = ""
    if budget_bytes is not None:
        gate = _GATE.format(budget=budget_bytes, increase=_MOST_INCREASE[scheme.bits], bits=scheme.bits)
    return f"""\
# {scheme.name} in groups of {scheme.group_size} for {_plain(model)}. Written by `compress recipes init`.
# Predicted size of the weights: {size}.

model: {_scalar(model)}

# Text that GPTQ looks at: a hub id, a folder, .jsonl, .txt, .parquet, or token ids in .safetensors.
# Text like what the model will see in use is best.
calibration: {{dataset: wikitext, samples: 128, length: {length}}}

stages:
  # {_NOTES[scheme.bits]}
  # Smaller groups are more precise and larger; `compress run --dry-run` says by how much.
  - quantize: {{method: gptq, scheme: {scheme.name}, group_size: {scheme.group_size}}}

# Measured on the original, too, so that the report shows what the compression costs.
evaluate:
  perplexity: {{dataset: wikitext, window: {length}, stride: {length // 2}}}
  through: runtime
{gate}"""


def _scalar(text: str) -> str:
    """`text` as a YAML value: quoted unless it is plainly a name."""
    return text if re.fullmatch(r"[A-Za-z][\w.-]*(/[A-Za-z][\w.-]*)?", text) else json.dumps(text)


def _plain(text: str) -> str:
    return " ".join(text.split())
