"""Bits per byte of a model on stories."""

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_BATCH_TOKENS = 8192


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> float:
    """Mean bits per UTF-8 byte of the stories.

    Each story stands alone after ``<s>``; every token but ``<s>`` is scored; a story beyond the context is cut, and
    only the bytes of what was scored count.
    """
    context = model.config.max_position_embeddings
    encoded = sorted((tokenizer(story, verbose=False)["input_ids"][:context] for story in stories), key=len)
    scored_bytes = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in encoded)
    model.eval()
    nats = sum(_nats(model, batch, tokenizer.pad_token_id) for batch in _batches(encoded))
    return nats / math.log(2) / scored_bytes


def _batches(encoded: list[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for ids in encoded:
        if batch and (len(batch) + 1) * len(ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _nats(model: PreTrainedModel, batch: list[list[int]], pad_id: int) -> float:
    longest = max(map(len, batch))
    # Padding stands on the right, where causal attention hides it from every token that is scored.
    ids_BT = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in batch])
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=pad_id, reduction="sum"
    ).item()
