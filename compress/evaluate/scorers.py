"""What runs a model while it is measured: transformers, or the bundled runtime.

Either gives logits of fixed windows (for perplexity and KL) and a language model for lm-eval's tasks, from one model
folder. Shapes: B samples, T positions, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from compress.core._forward import LOGITS_BYTES
from compress.core.errors import InputError
from compress.core.events import Listener

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Evaluation
    from kv_compress.policy import KVPolicy
    from runtime.llm import LLM

BLOCK_SIZE = 16


class Scorer(Protocol):
    """One model as something that can be scored. `protocol` says what its figures depend on."""

    @property
    def folder(self) -> Path:
        """Where the model lies."""
        ...

    @property
    def protocol(self) -> dict[str, Any]: ...

    def logits(self, tokens: Tokens) -> Iterator[torch.Tensor]:
        """Logits [B, T, V] of all samples in order."""
        ...

    def language_model(self, stage: str, events: Listener) -> Any:
        """A context in which lm-eval may ask the model."""
        ...


@dataclass
class TransformersScorer:
    """transformers' model. Logits come block by block from disk, so that a model larger than memory can be measured."""

    checkpoint: Checkpoint
    device: str = "cpu"
    dtype: str = "auto"
    micro_batch: int | None = None
    spill_folder: Path | None = None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def protocol(self) -> dict[str, Any]:
        return {"through": "transformers", "dtype": str(self._computed_in).removeprefix("torch.")}

    def logits(self, tokens: Tokens) -> Iterator[torch.Tensor]:
        from compress.core.walk import stream_logits

        return stream_logits(
            self.checkpoint,
            tokens,
            dtype=self.dtype,
            micro_batch=self.micro_batch,
            device=self.device,
            spill_folder=self.spill_folder,
        )

    @contextmanager
    def language_model(self, stage: str, events: Listener) -> Iterator[Any]:
        from compress.core.checkpoint import load_tokenizer
        from compress.evaluate._harness import Model

        model = self.checkpoint.build_model(dtype=self._computed_in, device=self.device)
        wrapped = Model(model, load_tokenizer(self.checkpoint.folder), stage, events)
        try:
            with torch.inference_mode():
                yield wrapped
        finally:
            del model, wrapped
            gc.collect()

    @property
    def _computed_in(self) -> torch.dtype:
        from compress.core.walk import compute_dtype

        return compute_dtype(self.checkpoint, self.dtype, self.device)


@dataclass
class RuntimeScorer:
    """The bundled runtime: what is scored is what is deployed. `kv_cache`: a policy or a codec for keys and values
    instead of the model's own."""

    checkpoint: Checkpoint
    device: str = "cpu"
    numerics: Literal["exact", "fast"] = "fast"
    dtype: str = "auto"
    kv_cache: KVPolicy | str | None = None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def protocol(self) -> dict[str, Any]:
        from compress.core.numerics import dtype_name, runtime_dtype

        dtype = runtime_dtype(self.numerics, self.device, self._dtype)
        return {"through": "runtime", "numerics": self.numerics, "dtype": dtype_name(dtype)}

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> Iterator[torch.Tensor]:
        from runtime.frames import cache_for, points_for
        from runtime.loader import load
        from runtime.windows import pages_for_window, window_logits

        model = load(
            self.checkpoint.folder,
            numerics=self.numerics,
            device=self.device,
            dtype=self._dtype,
            kv_cache=self.kv_cache,
        )
        samples, length = tokens.ids.shape
        if length > model.config.max_length:
            raise InputError(
                f"windows of {length} tokens are longer than the model's {model.config.max_length}",
                hint="lower evaluate.perplexity.window",
            )
        at_once = max(1, min(samples, LOGITS_BYTES // (4 * length * model.config.vocab)))
        points = points_for(model.config, model.kv_policy, model.dtype, BLOCK_SIZE)
        pages = at_once * pages_for_window(points, length, BLOCK_SIZE)
        cache = cache_for(model.config, pages, BLOCK_SIZE, model.dtype, self.device, model.kv_policy)
        for start in range(0, samples, at_once):
            yield window_logits(model, cache, tokens.ids[start : start + at_once].to(self.device))

    @contextmanager
    def language_model(self, stage: str, events: Listener) -> Iterator[Any]:
        from compress.core.checkpoint import load_tokenizer
        from compress.evaluate.lm import RuntimeLM
        from runtime.llm import LLM

        llm = LLM(
            self.checkpoint.folder,
            numerics=self.numerics,
            device=self.device,
            dtype=self._dtype,
            kv_cache=self.kv_cache,
            seed=0,
            max_sequences=64,
        )
        try:
            yield RuntimeLM(llm, load_tokenizer(self.checkpoint.folder), stage, events)
        finally:
            del llm
            gc.collect()

    @contextmanager
    def llm(self, longest: int) -> Iterator[LLM]:
        """The engine for prompts and answers of up to `longest` tokens; UsageError where the model takes fewer."""
        from runtime.llm import LLM

        llm = LLM(
            self.checkpoint.folder,
            numerics=self.numerics,
            device=self.device,
            dtype=self._dtype,
            seed=0,
            kv_cache=self.kv_cache,
            max_sequences=16,
            max_length=longest,
        )
        try:
            yield llm
        finally:
            del llm
            gc.collect()

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.dtype == "auto" else getattr(torch, self.dtype)


def make_scorer(
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    micro_batch: int | None = None,
    spill: Path | str | None = None,
) -> Scorer:
    """What runs `checkpoint`, as `evaluation` asks for it. `spill`: a folder for activations that are large."""
    if evaluation.through == "runtime":
        return RuntimeScorer(checkpoint, device, evaluation.numerics, dtype)
    from compress.core.files import make_folder

    return TransformersScorer(checkpoint, device, dtype, micro_batch, spill and make_folder(Path(spill)))
