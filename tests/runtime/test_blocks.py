"""The pool of pages by itself."""

from __future__ import annotations

import pytest

from compress.core.errors import ResourceError, UsageError
from runtime import prefixes
from runtime.blocks import BlockPool
from runtime.page import PageType
from runtime.sequence import Sequence

PAGE = PageType("float32", 256, 4)


def sequence(tokens: list[int], id: int = 0, tenant: str = "") -> Sequence:
    return Sequence(id, str(id), tokens, 4, tenant)


def stored(pool: BlockPool, tokens: list[int], id: int = 0, tenant: str = "") -> Sequence:
    """A sequence whose tokens are all computed, and whose full pages are in the prefix cache."""
    made = sequence(tokens, id, tenant)
    pool.begin(made, pool.lookup(made))
    assert pool.reserve(made, len(tokens)) == ()
    pool.register(made, len(tokens))
    made.computed = made.kv_len[0] = len(tokens)
    return made


def test_pages_come_from_memory() -> None:
    assert BlockPool.from_memory(1000, PAGE).pages == 3
    with pytest.raises(ResourceError, match="255 bytes .* no page of 256 bytes"):
        BlockPool.from_memory(255, PAGE)
    with pytest.raises(UsageError, match="at least one page"):
        BlockPool(0, PAGE)
    with pytest.raises(UsageError, match="tokens"):
        PageType("float32", 256, 0)


def test_a_page_is_free_owned_or_cached() -> None:
    pool = BlockPool(4, PAGE)
    holder = stored(pool, list(range(6)))
    assert (pool.statistics.free, pool.statistics.cached, pool.statistics.owned) == (2, 0, 2)
    pool.release(holder)
    assert (pool.statistics.free, pool.statistics.cached, pool.statistics.owned) == (3, 1, 0)
    assert holder.table == [()] and holder.kv_len == [0] and holder.computed == 0


def test_reserve_changes_nothing_when_pages_are_short() -> None:
    pool = BlockPool(2, PAGE)
    holder = sequence(list(range(20)))
    assert pool.reserve(holder, 12) is None
    assert holder.table[0] == () and pool.available == 2
    assert pool.reserve(holder, 8) == () and len(holder.table[0]) == 2


def test_a_hit_leaves_at_least_the_last_token() -> None:
    pool = BlockPool(8, PAGE)
    first = stored(pool, list(range(8)))
    assert pool.lookup(sequence(list(range(8)))).pages == first.table[0][:1]
    assert pool.lookup(sequence(list(range(9)))).pages == first.table[0]
    assert pool.lookup(sequence(list(range(4)))).pages == ()
    for limit, pages in ((-1, 0), (0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (99, 2)):
        limited = Sequence(1, "1", list(range(9)), 4, lookup_limit=limit)
        assert pool.lookup(limited).pages == first.table[0][:pages]
    assert pool.statistics.misses == 1  # of the first sequence, which alone has begun


def test_a_prefix_counts_from_its_beginning() -> None:
    pool = BlockPool(8, PAGE)
    stored(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.lookup(sequence([5, 6, 7, 8, 9])).pages == ()  # same page content, another place
    assert len(pool.lookup(sequence([1, 2, 3, 4, 9, 9, 9, 9, 9])).pages) == 1


def test_tenants_never_share() -> None:
    pool = BlockPool(8, PAGE)
    stored(pool, list(range(8)), tenant="a")
    assert pool.lookup(sequence(list(range(9)), tenant="b")).pages == ()
    assert len(pool.lookup(sequence(list(range(9)), tenant="a")).pages) == 2


def test_equal_digests_of_other_tokens_are_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "digest", lambda parent, content: b"the same for all")
    pool = BlockPool(8, PAGE)
    holder = stored(pool, list(range(8)))
    assert pool.lookup(sequence([9, 9, 9, 9, 9])).pages == ()
    assert pool.lookup(sequence([0, 1, 2, 3, 9])).pages == holder.table[0][:1]
    pool.check_integrity([holder])


def test_the_oldest_prefix_is_evicted_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(4, PAGE)
    old, new = stored(pool, list(range(8)), 0), stored(pool, list(range(50, 58)), 1)
    pool.release(old)
    pool.release(new)
    assert pool.statistics.cached == 4
    stored(pool, [99], 2)
    assert pool.statistics.evictions == 1
    assert len(pool.lookup(sequence(list(range(9)))).pages) == 1
    assert len(pool.lookup(sequence(list(range(50, 59)))).pages) == 2


def test_a_hit_makes_a_prefix_young_again() -> None:
    pool = BlockPool(4, PAGE)
    for id, start in enumerate((0, 50)):
        pool.release(stored(pool, list(range(start, start + 8)), id))
    pool.release(stored(pool, list(range(8)), 2))
    stored(pool, [99] * 5, 3)
    assert len(pool.lookup(sequence(list(range(9)))).pages) == 2
    assert pool.lookup(sequence(list(range(50, 59)))).pages == ()


def test_a_fork_copies_the_page_that_it_writes_first() -> None:
    pool = BlockPool(8, PAGE)
    parent = stored(pool, list(range(6)))
    child = sequence(list(range(6)), 1)
    pool.fork(parent, child, 6)
    assert child.table == parent.table and pool.statistics.owned == 2
    shared = parent.table[0][1]
    copies = pool.reserve(child, 7)
    assert copies == ((shared, child.table[0][1]),) and child.table[0][1] != shared
    assert pool.reserve(parent, 7) == ()  # it is alone on its page now
    pool.check_integrity([parent, child])


def test_a_page_in_the_cache_is_copied_before_it_is_written() -> None:
    pool = BlockPool(8, PAGE)
    parent = stored(pool, list(range(8)))
    child = sequence(list(range(8)), 1)
    pool.fork(parent, child, 7)
    pool.release(parent)
    assert pool.reserve(child, 8) == ((1, 2),)
    pool.check_integrity([child])


def test_crowded_are_those_that_reserve_would_do_something_for() -> None:
    pool = BlockPool(16, PAGE)
    roomy, full = stored(pool, list(range(6))), stored(pool, list(range(100, 108)), 1)
    parent, child = stored(pool, list(range(200, 206)), 2), sequence(list(range(200, 206)), 3)
    pool.fork(parent, child, 6)
    known, gone = sequence(list(range(300, 308)), 4), stored(pool, list(range(300, 308)), 5)
    pool.fork(gone, known, 7)
    pool.release(gone)
    everybody = [roomy, full, parent, child, known]
    assert pool.crowded(everybody) == [full, parent, child, known]
    for one in (full, parent, known):
        before = one.table[0]
        assert pool.reserve(one, one.kv_len[0] + 1) is not None
        assert one.table[0] != before
    assert pool.crowded(everybody) == []  # the child is alone on its page now
    pool.check_integrity(everybody)


def test_a_copy_that_finds_no_page_changes_nothing() -> None:
    pool = BlockPool(2, PAGE)
    parent, child = stored(pool, list(range(6))), sequence(list(range(6)), 1)
    pool.fork(parent, child, 6)
    assert pool.reserve(child, 7) is None
    assert child.table == parent.table
    pool.check_integrity([parent, child])


def test_no_double_free() -> None:
    pool = BlockPool(4, PAGE)
    holder = stored(pool, list(range(6)))
    table = holder.table[0]
    pool.release(holder)
    pool.release(holder)  # nothing left to give back
    pool.check_integrity([])
    holder.table[0] = table
    with pytest.raises(RuntimeError, match="page 1 is given back but nobody holds it"):
        pool.release(holder)


def test_forgotten_pages_are_not_found() -> None:
    pool = BlockPool(8, PAGE)
    holder = stored(pool, list(range(8)))
    pool.release(stored(pool, list(range(20, 28)), 1))
    pool.forget(holder.table[0])
    assert pool.lookup(sequence(list(range(9)))).pages == ()
    assert len(pool.lookup(sequence(list(range(20, 29)))).pages) == 2
    pool.forget()
    assert pool.statistics.cached == 0 and pool.statistics.free == 6
    pool.check_integrity([holder])


def test_the_same_content_is_kept_once() -> None:
    pool = BlockPool(8, PAGE)
    first = Sequence(0, "0", list(range(4)), 4)
    second = Sequence(1, "1", list(range(4)), 4)
    for holder in (first, second):
        pool.reserve(holder, 4)
        pool.register(holder, 4)
        holder.computed = holder.kv_len[0] = 4
    pool.check_integrity([first, second])
    pool.release(first)
    pool.release(second)
    assert (pool.statistics.cached, pool.statistics.free) == (1, 7)


def rename(keys: list) -> None:
    keys[0] = keys[0]._replace(tokens=(9,))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda pool, holder: pool._free.append(holder.table[0][0]), "two states"),
        (lambda pool, holder: pool._free.pop(), "free"),
        (lambda pool, holder: pool._references.__setitem__(holder.table[0][0], 2), "reference counts"),
        (lambda pool, holder: holder.table.__setitem__(0, (0, 0)), "stores"),
        (lambda pool, holder: holder.kv_len.__setitem__(0, 9), "stores"),
        (lambda pool, holder: setattr(holder, "computed", 9), "computed more"),
        (lambda pool, holder: rename(holder.stretches[0].keys), "other tokens"),
        (lambda pool, holder: pool._prefixes._page.clear(), "prefix index"),
        (lambda pool, holder: setattr(pool, "_owned", 1), "owned of"),
    ],
)
def test_integrity_sees_damage(damage, complaint: str) -> None:
    pool = BlockPool(4, PAGE)
    holder = stored(pool, list(range(8)))
    pool.check_integrity([holder])
    damage(pool, holder)
    with pytest.raises(RuntimeError, match=complaint):
        pool.check_integrity([holder])
