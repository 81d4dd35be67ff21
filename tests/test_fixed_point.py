"""Sums that do not depend on the order: exact where they promise it, and an error where they end."""

import functools
import math
import random
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from saev_dist.accumulators import fixed_point
from saev_dist.errors import MergeError


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@given(st.lists(st.floats(-(2.0**61), 2.0**61), min_size=1, max_size=20), st.randoms())
@example([-1e-5], random.Random(0))
def test_fixed_point_sums_do_not_depend_on_the_order(numbers, shuffler):
    def total(xs):
        limbs = [fixed_point.from_float(doubles(x / len(numbers))) for x in xs]
        return functools.reduce(fixed_point.add, limbs)

    shuffled = shuffler.sample(numbers, len(numbers))
    assert torch.equal(total(numbers), total(shuffled))
    exact = math.fsum(x / len(numbers) for x in numbers)
    assert fixed_point.to_float(total(numbers)).item() == pytest.approx(exact, rel=1e-12, abs=1e-17)


def test_a_sum_that_would_wrap_is_an_error():
    for sign in (1, -1):
        big = fixed_point.from_float(doubles(sign * 2.0**61))
        with pytest.raises(MergeError):
            fixed_point.add(big, big)
    for bad in (math.inf, math.nan, 2.0**62, -(2.0**62)):
        with pytest.raises(MergeError):
            fixed_point.from_float(doubles(bad))
    with pytest.raises(MergeError):
        fixed_point.from_parts(fixed_point.to_parts(doubles(2.0**62)))


def test_parts_that_are_added_carry():
    parts_4n = fixed_point.to_parts(doubles(2.0**32 - 1, 1, (2.0**32 - 1) * 2.0**-62, 2.0**-62))
    assert fixed_point.from_parts(parts_4n.sum(1, keepdim=True)).tolist() == [[2**32, 2**32]]


def test_as_many_parts_as_may_be_added_do_not_wrap():
    assert fixed_point.MAX_ADDED * 2**fixed_point.PART_BITS < 2**63


def test_what_lies_between_two_limbs_goes_to_the_nearer():
    x = doubles(0.75 * 2.0**-62)
    assert fixed_point.from_float(x).tolist() == [[0, 1]]
    assert fixed_point.to_parts(x).tolist() == [[0], [0], [0], [1]]


def test_small_sums_keep_their_digits():
    assert fixed_point.to_float(fixed_point.from_float(doubles(1e-12))).item() == pytest.approx(1e-12, rel=1e-6, abs=0)


def test_fractions_of_limbs_are_exact():
    assert fixed_point.to_fractions(torch.tensor([[0, 2**62 - 1]])) == [1 - Fraction(1, 2**62)]
