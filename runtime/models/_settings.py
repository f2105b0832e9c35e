"""A config.json that remembers what was read, so that a setting which nobody understood is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError

_REQUIRED = object()

# Keys that change nothing about what a trained model computes: training, bookkeeping, generation, other readers' hints.
HARMLESS = frozenset(
    {"architectures", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation"}
    | {
        "compress_kv_cache",
        "compress_masked",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "experts_implementation",
        "id2label",
    }
    | {"initializer_range", "is_decoder", "keys_to_ignore_at_inference", "label2id", "max_length", "model_type"}
    | {"name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict"}
    | {"router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "tie_last_hidden_states", "tokenizer_class"}
    | {"torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache"}
    | {"do_sample", "max_new_tokens", "min_length", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p"}
)


class Settings:
    """Typed access to one mapping of a config. Errors name file, field and value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """The value, `default` where it is missing or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number."""
        value = self.raw(key, default)
        if value is _REQUIRED or type(value) is not int or value < 1:
            raise self.wrong(key, "not a positive whole number")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number above zero."""
        value = self.raw(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.wrong(key, "not a positive number")
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A number above zero, None where the key is null; `default` only where the key is missing."""
        value = self.raw(key, None if key in self._values else default)
        return None if value is None else self.number(key, value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "neither true nor false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "not a text")
        return value

    def section(self, key: str) -> Settings | None:
        """A mapping inside, None where it is missing or null."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "not a mapping")
        return Settings(value, f"{self._where}: {key}")

    def has(self, key: str) -> bool:
        """Whether the key is there, even as null."""
        return key in self._values

    def stated(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self._values.get(key) is not None

    def wrong(self, key: str, reason: str, hint: str | None = None) -> InputError:
        """The error for a value that cannot be used."""
        if key not in self._values:
            return InputError(f"{key} is missing", where=self._where, hint=hint)
        return InputError(f"{key} is {shown(self._values[key])}, {reason}", where=self._where, hint=hint)

    def refuse_rest(self, harmless: frozenset[str] = frozenset()) -> None:
        """InputError for the first setting that nobody read. Null, false, zero and empty mean "off" and pass."""
        for key, value in self._values.items():
            if key in self._read or key in harmless or key.startswith("_") or not value:
                continue
            hint = "evaluate the model through transformers; if the key means nothing, remove it"
            raise self.wrong(key, "a setting that the runtime does not understand", hint)


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
