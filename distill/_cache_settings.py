"""`cache:` of distillation: what of the teacher's distributions is kept, and where."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.recipe_sections import Section, Text

SHORT_IDS = 1 << 16  # vocabularies up to here have ids of two bytes
POSITION_BYTES = 4  # one number in fp32: the entropy, or the tail


class Cache(Section):
    """The teacher's distributions for the rows of `calibration`, written once and read from then on.

    sampled: token ids drawn from the teacher's distribution, with counts (random sampling: Anshumann et al., 2025,
    arXiv:2503.16870). topk: the most likely tokens with their log-probabilities, and the mass of all others.
    """

    codec: Literal["sampled", "topk"] = Field("sampled", description="sampled: unbiased; topk: the most likely tokens")
    draws: int = Field(
        24, ge=1, le=255, description="of sampled: token ids drawn at a position; equal ones are counted"
    )
    spread: Literal["even", "random"] = Field(
        "even", description="of sampled: draws at equal distances along the distribution, or each by itself"
    )
    k: int = Field(64, ge=1, description="of topk: tokens kept at a position")
    tail: Literal["bucket", "drop"] = Field(
        "bucket", description="of topk: all other tokens as one, or left out and the rest scaled to 1 (which is biased)"
    )
    seed: int = Field(0, ge=0, description="of sampled: decides what is drawn")
    folder: Text | None = Field(
        None, description="where it lies and stays, from the recipe's folder; left out: with the run, which removes it"
    )

    def written(self) -> dict[str, Any]:
        """The settings that decide what is written, as plain data: how a tail is read is no matter of the file."""
        kept = ("codec", "draws", "spread", "seed") if self.codec == "sampled" else ("codec", "k")
        return self.model_dump(mode="json", include=set(kept))

    def require_kept(self, vocabulary: int) -> None:
        """UsageError if more tokens are to be kept at a position than there are."""
        if self.codec == "topk" and self.k > vocabulary:
            raise UsageError(
                f"cache.k is {self.k}, and the vocabulary has {vocabulary} tokens",
                where="distill.cache",
                hint="lower k",
            )

    def most(self, vocabulary: int) -> int:
        """Tokens kept at a position, at most."""
        return min(vocabulary, self.draws if self.codec == "sampled" else self.k)

    def token_bytes(self, vocabulary: int) -> int:
        """Bytes of a position, at most."""
        most = self.most(vocabulary)
        id_bytes, weight_bytes = 2 if vocabulary <= SHORT_IDS else 4, 1 if self.codec == "sampled" else 4
        return most * (id_bytes + weight_bytes) + (1 if most < 1 << 8 else 4) + POSITION_BYTES
