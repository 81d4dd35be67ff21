"""Bins hold what they say, and percentiles come from them by the nearest-rank definition."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from saev_dist.accumulators import histogram
from saev_dist.accumulators.histogram import N_BINS, Histogram, bin_of, edges
from tests.laws import D_SAE, as_dense, batches, contiguous, fold


@given(st.floats(min_value=2.0**-149, max_value=2.0**127, width=32))
def test_a_score_lies_between_its_bins_edges(value):
    i = int(bin_of(torch.tensor([value])))
    assert edges()[i] <= value < edges()[i + 1]
    assert len(edges()) == N_BINS + 1


@given(batches(), st.sampled_from([0.0, 50.0, 90.0, 99.0, 100.0]))
def test_percentile_is_within_its_stated_error(group, percentile):
    group = contiguous(group)
    dense = as_dense(group).reshape(-1, D_SAE)
    if not len(dense):
        return
    found = fold(lambda: Histogram(D_SAE, percentile), group).finalize(len(dense))[f"percentiles_p{percentile:g}"]
    for s in range(D_SAE):
        true = np.percentile(np.maximum(dense[:, s], 0), percentile, method="inverted_cdf")
        if 2**-16 <= true < 2**16:
            assert found[s].item() == pytest.approx(true, rel=1 / 32)
        elif true == 0:
            assert found[s] == 0
        else:  # outside of the bins: on the right side of their end
            assert (0 < found[s] < 2**-16) if true < 1 else found[s] == 2**16


def counted(percentile: float, *counts: tuple[int, int]) -> Histogram:
    """Of one feature, so many scores in each of some bins."""
    acc = Histogram(1, percentile)
    for i, n in counts:
        acc.counts_sh[0, i] = n
    return acc


def is_in(value: torch.Tensor, i: int) -> bool:
    return bool(edges()[i] < value < edges()[i + 1])


def test_percentiles_are_told_apart_to_a_millionth():
    assert is_in(counted(99.9999, (100, 10**6 - 1), (200, 1)).finalize(10**6)["percentiles_p99.9999"], 100)
    assert "percentiles_p99.99999" in Histogram(1, 99.99999).finalize(1)


def test_the_lowest_percentile_is_the_smallest_score_of_a_feature_that_always_fires():
    acc = counted(0, (100, 3))
    assert is_in(acc.finalize(3)["percentiles_p0"], 100)
    assert acc.finalize(4)["percentiles_p0"] == 0


@pytest.mark.parametrize(("percentile", "n_tokens", "rank"), [(1.1, 3_000, 33), (1.001, 10**8, 1_001_000)])
def test_ranks_of_percentiles_are_not_off_by_rounding(percentile, n_tokens, rank):
    for n_low, i in ((rank, 100), (rank - 1, 200)):
        acc = counted(percentile, (100, n_low), (200, n_tokens - n_low))
        assert is_in(acc.percentiles(n_tokens, percentile), i)


def test_percentiles_of_many_features_are_each_their_own(monkeypatch):
    monkeypatch.setattr(histogram, "PERCENTILE_ROWS", 3)
    acc = Histogram(8, 50.0)
    for s in range(8):
        acc.counts_sh[s, 100 + s] = s + 1  # of eight tokens
    found = acc.percentiles(8, 50.0)
    assert found[:4].tolist() == [0] * 4
    assert all(is_in(found[s], 100 + s) for s in range(4, 8))
