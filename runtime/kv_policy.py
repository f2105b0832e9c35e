"""Which policy for keys and values a model runs with: the caller's, that of its config.json, or fp8 as other tools
write it (kv_cache_scheme with a k_scale and a v_scale for each layer, compressed-tensors)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from compress.core.kv_agreement import require_agreement_in
from compress.core.kv_scheme import is_scale, scale_names, scheme_in
from compress.core.model_files import KV_CACHE_KEY
from kv_compress.policy import FULL, Coding, KVPolicy, LayerPolicy, policy_in

if TYPE_CHECKING:
    from kv_compress.eviction import EvictionSettings


def policy_of(
    checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]], asked: KVPolicy | str | None = None
) -> KVPolicy | None:
    """The policy, None where keys and values are kept as they are. `sizes`: heads and width of each layer. InputError
    for one that does not fit the layers, or that config.json and the manifest do not agree on; UsageError for a codec
    that does not exist."""
    where = str(checkpoint.folder / "config.json")
    if asked is not None and not isinstance(asked, str | KVPolicy):
        raise UsageError(f"kv_cache is a codec's name or a KVPolicy (kv_compress.policy), not {asked!r:.60}")
    if isinstance(asked, str):
        policy = KVPolicy.uniform(asked, len(sizes))
    elif asked is not None:
        policy = asked
    else:
        require_agreement_in(checkpoint.folder, checkpoint.config)
        policy = policy_in(checkpoint.config, where) or _of_scheme(checkpoint, len(sizes))
    if policy is not None:
        place = "kv_cache" if asked is not None else f"{where}: {KV_CACHE_KEY}"
        policy.require_fits(sizes, place)
        _require_eviction(policy, place)
    return policy


def _require_eviction(policy: KVPolicy, where: str) -> None:
    """InputError for an eviction that makes no sense."""
    if policy.eviction is not None:
        from kv_compress.eviction import eviction_of  # needs pydantic, which a bare GPU machine may lack

        eviction_of(policy, where)


@contextmanager
def blaming(folder: Path, field: str, *, own: bool) -> Iterator[None]:
    """A policy that cannot be obeyed: InputError with file and field where it is the artifact's own."""
    try:
        yield
    except UsageError as error:
        if not own:
            raise
        where = f"{folder / 'config.json'}: {KV_CACHE_KEY}.{field}"
        raise InputError(error.message, where=where, hint=error.hint) from None


def with_eviction(policy: KVPolicy | None, layers: int, eviction: EvictionSettings) -> KVPolicy:
    """A policy, of keys and values in full where there is none, that drops some of them."""
    settings = eviction.model_dump(mode="json", exclude_defaults=True)
    return replace(policy or KVPolicy.uniform(FULL, layers), eviction=settings)


def scales_of(checkpoint: Checkpoint) -> list[str]:
    """Tensors of the model that hold scales of keys and values, where its config speaks of them."""
    spoken_of = scheme_in(checkpoint.config) is not None or KV_CACHE_KEY in checkpoint.config
    return list(filter(is_scale, checkpoint.tensors)) if spoken_of else []


def _of_scheme(checkpoint: Checkpoint, count: int) -> KVPolicy | None:
    if scheme_in(checkpoint.config) is None:
        return None
    layers = []
    for index in range(count):
        codings = []
        for name in scale_names(checkpoint.block_name(index)):
            scale = checkpoint.tensor(name).float().flatten().tolist() if name in checkpoint.tensors else [1.0]
            if not all(0 < number < float("inf") for number in scale):
                raise InputError(f"tensor {name!r} is no scale: {scale}", where=str(checkpoint.folder))
            codings.append(Coding("fp8", scale=tuple(scale)))
        layers.append(LayerPolicy(*codings))
    return KVPolicy(tuple(layers))
