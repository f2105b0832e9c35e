"""Requests that are refused: those that could never be served, and those that come when too many wait."""

from __future__ import annotations

from compress.core.errors import ResourceError, UsageError
from kv_compress._coded_pages import CodingPoints
from runtime.blocks import BlockPool
from runtime.sequence import Sequence


class RequestTooLong(UsageError):
    """A request that could never be served, however long it waited."""


class QueueFull(ResourceError):
    """As many requests wait as may wait: come back later."""


def require_fit(sequence: Sequence, max_length: int, pool: BlockPool) -> None:
    """RequestTooLong with the exact limit, unless the sequence can grow to its end when it is alone in the pool."""
    prompt, asked = len(sequence.prompt), sequence.max_tokens
    if not prompt or asked < 0:
        raise UsageError(f"a request needs a prompt and max_tokens of 0 or more, not {prompt} tokens and {asked}")
    in_memory = pool.slots + (asked > 0)  # the last token is sampled, but never stored
    if pool.points is not None and prompt + asked <= max_length:
        _require_points_fit(sequence, pool)
        return
    limit = max_length if pool.points is not None else min(max_length, in_memory)
    if prompt + asked <= limit:
        return
    if limit == max_length:
        reason = "tokens a sequence may have (max_length)"
    else:
        reason = f"tokens that the memory for keys and values can hold ({pool.pages} pages of {pool.page.tokens})"
    raise RequestTooLong(
        f"a prompt of {prompt:,} tokens and max_tokens {asked:,} are {prompt + asked - limit:,} more than the "
        f"{limit:,} {reason}",
        hint=f"with this prompt max_tokens can be at most {limit - prompt:,}"
        if prompt < limit
        else "shorten the prompt",
    )


def _require_points_fit(sequence: Sequence, pool: BlockPool) -> None:
    """The same where evictions bound what is stored at any one time."""
    prompt, end = len(sequence.prompt), sequence.longest - (sequence.max_tokens > 0)
    slots = 0 if pool.points is None else pool.points.peak(0, 0, prompt, end)
    how = "where pages are coded" if isinstance(pool.points, CodingPoints) else "with evictions"
    if pool.pages_for(slots) > pool.pages:
        raise RequestTooLong(
            f"a prompt of {prompt:,} tokens and max_tokens {sequence.max_tokens:,} take {slots:,} slots at once, even "
            f"{how}, more than the {pool.slots:,} that the memory for keys and values has",
            hint="shorten the prompt, or give keys and values more memory"
            if isinstance(pool.points, CodingPoints)
            else "evict within the prompt (when: prefill_chunk) or with a smaller budget, or shorten the prompt",
        )


def require_place(waiting: int, max_queue: int) -> None:
    """QueueFull if no more may wait."""
    if waiting >= max_queue:
        raise QueueFull(f"{waiting:,} requests wait already, the most that may (max_queue)", hint="try again later")
