"""Samples of one request share what they have in common."""

from __future__ import annotations

import pytest

from compress.core.errors import UsageError
from tests.runtime.bench import Bench, settings


def test_samples_share_the_prompt_and_part_where_they_differ() -> None:
    bench = Bench()
    parent = bench.add([1, 2, 0, 1, 2, 2], 6)
    bench.step()
    children = [bench.fork(parent, last=token) for token in (10, 11)]
    assert bench.pool.statistics.owned == 2
    step = bench.step()
    assert len(step.copies) == 2 and len(step.rows) == 3  # the last writer keeps the page
    assert bench.pool.statistics.owned == 4
    bench.run()
    assert [child.generated[0] for child in children] == [10, 11]
    assert all(len(child.generated) == 6 for child in children)


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8])
def test_a_sample_may_choose_its_first_token_itself(prompt: int) -> None:
    bench = Bench()
    parent = bench.add([1, 2, 0, 1, 2, 2, 1, 0][:prompt], 6)
    bench.step()
    bench.fork(parent, fresh=True)
    first, second = bench.run()
    assert first == second  # greedy, after all


def test_samples_use_fewer_pages_than_requests_of_their_own() -> None:
    prompt = [1, 2, 0, 1, 2, 2, 1, 0] * 3
    shared, apart = (Bench(pages=40, settings=settings(prefix_cache=False)) for _ in range(2))
    parent = shared.add(prompt, 8)
    shared.step()
    for token in (10, 11):
        shared.fork(parent, last=token)
    for _ in range(3):
        apart.add(prompt, 8)
    apart.step()
    for bench in (shared, apart):
        bench.step()
    assert shared.pool.statistics.owned <= 0.6 * apart.pool.statistics.owned


def test_a_sample_gets_in_line_where_no_more_may_run() -> None:
    bench = Bench(settings=settings(max_sequences=1))
    parent = bench.add([1, 2, 0], 4)
    bench.step()
    child = bench.fork(parent)
    assert child.status == "waiting"
    first, second = bench.run()
    assert first == second


def test_a_sample_gets_in_line_while_its_parent_is_read() -> None:
    bench = Bench(settings=settings(token_budget=4))
    parent = bench.add([1, 2, 0, 1, 2, 2, 1], 4)
    bench.step()
    child = bench.fork(parent)
    assert (parent.computed, child.status) == (4, "waiting")
    first, second = bench.run()
    assert first == second


def test_a_sample_of_another_tenant_or_beginning_is_refused() -> None:
    bench = Bench()
    parent = bench.add([1, 2, 0], 4, tenant="a")
    bench.step()
    with pytest.raises(UsageError, match="does not begin like"):
        bench.scheduler.fork(parent, bench.sequence([1, 2, 0], 4, tenant="b"))
    with pytest.raises(UsageError, match="does not begin like"):
        bench.scheduler.fork(parent, bench.sequence([1, 1, 0], 4, tenant="a"))
    bench.check()
