"""Requests that are refused: those that could never be served, and those that come when too many wait."""

from __future__ import annotations

from compress.core.errors import ResourceError, UsageError
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
    limit = min(max_length, in_memory)
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


def require_place(waiting: int, max_queue: int) -> None:
    """QueueFull if no more may wait."""
    if waiting >= max_queue:
        raise QueueFull(f"{waiting:,} requests wait already, the most that may (max_queue)", hint="try again later")
