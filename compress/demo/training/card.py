"""The demo model's card."""

from dataclasses import dataclass
from pathlib import Path

from compress.core.files import atomic_write
from compress.demo.training.loop import Settings

_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
tags: [tiny, stories, llama]
---
# Demo model

A very small Llama-architecture language model that writes children's stories. It ships with the project so that every
command can be tried offline in seconds. It is a test object, not an assistant.

| | |
|---|---|
| parameters | {parameters:,}, stored in bfloat16 |
| shape | 4 layers, hidden 256, ffn 768, 8 heads / 4 KV heads of dimension 32, tied embeddings |
| context | 512 tokens |
| tokenizer | own byte-level BPE, 2048 entries; a plain `encode()` puts `<s>` in front; `</s>` ends a story |

## How it came about

Trained from nothing by `python -m compress.demo.train_demo_model` on two threads of an ordinary CPU: {steps:,} steps of
{batch_tokens:,} tokens, {epochs:.1f} epochs over {training_stories:,} stories ({training_tokens:,} tokens) of
TinyStories (Eldan and Li 2023, arXiv:2305.07759; licence CDLA-Sharing-1.0). The text is not included here. Muon (rate
{muon_lr}) for the matrices of the blocks, AdamW (rate {adam_lr}) for embedding and norms, weight decay {weight_decay},
seed {seed}; the weights are those of step {best_step:,}, the best by held-out bits per byte. {remark}

## Figures

Bits per UTF-8 byte, each story alone after `<s>`, every token but `<s>` scored; weights as stored, float32 arithmetic:

| text | bits per byte |
|---|---|
| {held_out_stories} TinyStories stories held out from training | {held_out_bits:.3f} |
| {training_sample} of the training stories | {training_bits:.3f} |
| the project's own evaluation stories (`compress/demo/data/evaluation.jsonl`) | {own_bits:.3f} |

The {held_out_stories} stories are a seeded random {held_out_share:.0%} of all, whole stories, repetitions removed.
Training stories that share more than a tenth of their 8-word sequences with them were left out. They chose the
best step, and nothing else. The project's own stories use more words than TinyStories; none of them was trained on.

## Limits

English only, simple words only. It knows no facts, follows no instructions, loses the thread after a few sentences and
repeats the habits of its training text, clichés about boys, girls and families among them. Neither filtered nor
aligned. Good for trying out tools, and for nothing else.

## Licence

Weights, tokenizer and card: Apache-2.0, as the project. The training text's licence puts no restriction on what is
computed from it.
"""


@dataclass(frozen=True)
class Figures:
    """What the card reports of one run."""

    parameters: int
    training_stories: int
    training_tokens: int
    training_sample: int
    held_out_stories: int
    best_step: int
    held_out_bits: float
    training_bits: float
    own_bits: float


def write_card(folder: Path, settings: Settings, figures: Figures, remark: str) -> None:
    """Write README.md into the model folder."""
    epochs = settings.steps * settings.batch_tokens / figures.training_tokens
    text = _CARD.format(**vars(settings), **vars(figures), epochs=epochs, remark=remark)
    atomic_write(folder / "README.md", text)
