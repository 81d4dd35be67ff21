"""Plans and intervals: every batch once, in order, whoever computes it."""

from collections import Counter
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from saev_dist.plan import Plan, complement, subtract, union

examples = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(examples, st.integers(1, 5))
def test_batches_cover_every_example_once_in_order(per_shard, per_batch):
    plan = Plan(per_shard, per_batch)
    seen = [(b.shard_i, b.example_i + i) for b in plan for i in range(b.n_examples)]
    assert seen == [(shard, i) for shard, n in enumerate(per_shard) for i in range(n)]
    assert [b.img_i + i for b in plan for i in range(b.n_examples)] == list(range(sum(per_shard)))
    assert all(1 <= b.n_examples <= per_batch for b in plan)
    assert plan.sizes() == Counter(b.n_examples for b in plan)
    for shard_i in range(len(per_shard)):
        assert list(range(*plan.shard_batches(shard_i))) == [b.index for b in plan if b.shard_i == shard_i]
    for index in (-1, plan.n_batches):
        with pytest.raises(IndexError):
            plan[index]


@st.composite
def interval_sets(draw, n: int):
    cuts = sorted(set(draw(st.lists(st.integers(0, n), max_size=6))))
    return tuple((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False))


@given(st.data(), examples, st.integers(1, 5), st.integers(1, 8))
def test_a_deal_shares_out_what_is_left_evenly_and_in_order(data, per_shard, per_batch, n_ranks):
    plan = Plan(per_shard, per_batch)
    todo = complement(data.draw(interval_sets(plan.n_batches)), plan.n_batches)
    shares = plan.deal(todo, n_ranks)
    assert len(shares) == n_ranks
    batches = [i for share in shares for first, stop in share for i in range(first, stop)]
    assert batches == [i for first, stop in todo for i in range(first, stop)]
    sizes = [plan.n_examples_in(share) for share in shares]
    assert max(sizes) <= plan.n_examples_in(todo) / n_ranks + per_batch


def test_ranks_get_the_same_where_batches_can_be_shared_out_evenly():
    assert Plan([6, 6, 6, 6], 3).deal(((0, 8),), 4) == [((0, 2),), ((2, 4),), ((4, 6),), ((6, 8),)]


@given(st.integers(0, 30).flatmap(lambda n: st.tuples(st.just(n), interval_sets(n))))
def test_a_set_and_its_complement_make_the_whole(case):
    n, done = case
    assert union([done, complement(done, n)]) == (((0, n),) if n else ())


def test_batches_that_are_covered_twice_are_named():
    with pytest.raises(ValueError, match="batches 3 to 4"):
        union([((0, 5),), ((3, 8),)])


def test_a_plan_for_two_billion_images_is_small_and_exact():
    plan = Plan([20_000] * 100_000, 4)
    last = plan[plan.n_batches - 1]
    assert (last.shard_i, last.img_i, last.n_examples) == (99_999, 2_000_000_000 - 4, 4)
    shares = plan.deal(((0, plan.n_batches),), 1024)
    assert {plan.n_examples_in(share) // 1000 for share in shares} == {1953}


def numbers(intervals):
    return [index for first, stop in intervals for index in range(first, stop)]


batch_sets = st.sets(st.integers(0, 30)).map(lambda chosen: union(((i, i + 1),) for i in chosen))


@given(batch_sets, batch_sets)
def test_subtract_is_the_difference_of_sets(a, b):
    left = subtract(a, b)
    assert numbers(left) == sorted(set(numbers(a)) - set(numbers(b)))
    assert all(stop < first for (_, stop), (first, _) in pairwise(left)), "not in normal form"
    assert all(first < stop for first, stop in left)


@given(
    examples,
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.floats(0, 1), min_size=6, max_size=6)), max_size=5),
    st.integers(1, 6),
)
def test_whatever_dies_every_batch_is_done_once(per_shard, per_batch, attempts, last_n_ranks):
    """Random plans, worlds and deaths: each rank of an attempt keeps a beginning of its share, the last one all of it."""
    plan = Plan(per_shard, per_batch)
    kept = []
    for n_ranks, shares_done in [*attempts, (last_n_ranks, [1.0] * 6)]:
        todo = complement(union(kept), plan.n_batches)
        for share, done in zip(plan.deal(todo, n_ranks), shares_done, strict=False):
            batches = numbers(share)
            kept.append(union(((i, i + 1),) for i in batches[: round(done * len(batches))]))
    assert union(kept) == (((0, plan.n_batches),) if plan.n_batches else ())  # union refuses what is covered twice
