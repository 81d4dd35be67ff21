"""The CPU's slices against torch's whole blocks, and both against a loop; pieces against whole batches."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays

from saev_dist.accumulators import topk
from saev_dist.accumulators.base import stable_order
from saev_dist.accumulators.topk import TopK as Slots
from saev_dist.sae import encoder, select
from saev_dist.sae.encoder import Encoder, block_tokens, piece_images
from saev_dist.sae.model import Activation, GroupMax, Relu, Sae, Threshold, TopK
from tests.laws import D_SAE, N_PATCHES, batches, fold, same
from tests.synthetic import make_acts, make_weights

CPU = torch.device("cpu")
KINDS: list[Activation] = [Relu(), Threshold(0.5), TopK(1), TopK(3), TopK(12), TopK(99), GroupMax(4)]
BLOCKS = arrays.arrays(
    "float32", st.tuples(st.integers(1, 9), st.just(12)), elements=st.sampled_from([-1.0, -0.0, 0.0, 0.25, 1, 1, 2])
)


def by_loop(row: list[float], kind: Activation) -> list[int]:
    """Columns that a row keeps."""
    match kind:
        case TopK(k):
            strongest = sorted(range(len(row)), key=lambda s: (-row[s], s))[:k]
            return sorted(s for s in strongest if row[s] != 0)
        case GroupMax(k):
            size = len(row) // k
            best = [max(range(g * size, (g + 1) * size), key=lambda s: (row[s], -s)) for g in range(k)]
            return [s for s in best if row[s] > 0]
        case Threshold(threshold):
            return [s for s, value in enumerate(row) if value > threshold]
    return [s for s, value in enumerate(row) if value > 0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(block=BLOCKS, slice_codes=st.sampled_from([1, 30, 2**20]))
def test_slices_and_whole_blocks_keep_what_a_loop_keeps(kind, block, slice_codes):
    h_bs, threshold = torch.from_numpy(block), kind.threshold if isinstance(kind, Threshold) else 0.0
    expected = [b * 12 + s for b, row in enumerate(block.tolist()) for s in by_loop(row, kind)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "SLICE_CODES", slice_codes)
        for flat_n, value_n in (select.select(h_bs, kind, threshold), select._select_at_once(h_bs, kind, threshold)):
            assert flat_n.tolist() == expected
            assert torch.equal(value_n, h_bs.view(-1)[flat_n])


@given(st.lists(st.integers(0, 2**33 - 1), max_size=30), st.integers(1, 7))
def test_the_order_is_stable_for_keys_of_any_size(keys, step):
    keys = [key // step * step for key in keys]
    assert stable_order(torch.tensor(keys, dtype=torch.int64), 2**33).tolist() == sorted(range(len(keys)), key=keys.__getitem__)


@pytest.mark.parametrize("kind", [Relu(), TopK(4)], ids=str)
@pytest.mark.parametrize(("piece_codes", "block_codes"), [(1, 2**25), (500, 2**25), (1, 30), (10**6, 100)])
def test_codes_do_not_depend_on_pieces_and_blocks(monkeypatch, kind, piece_codes, block_codes):
    weights = make_weights()
    sae = Sae(**weights, activation=kind, pre_bias=False, source="integers")
    acts_bd = torch.from_numpy(make_acts(11)).view(-1, sae.d_model)
    with Encoder(sae, CPU, "fp32", 1) as whole:
        expected = whole.encode(acts_bd, img_i=3, n_patches=5)
    monkeypatch.setattr(encoder, "PIECE_CODES", piece_codes)
    monkeypatch.setattr(encoder, "BLOCK_CODES", block_codes)
    with Encoder(sae, CPU, "fp32", 2) as cut:
        pieces = [codes() for codes in cut.submit_batch(acts_bd, img_i=3, n_patches=5)]
    assert (len(pieces) == 1) == (piece_codes == 10**6)
    dense_bs, expected_bs = torch.zeros(55, sae.d_sae), torch.zeros(55, sae.d_sae)
    expected_bs[expected.token_n, expected.feature_n] = expected.value_n
    for codes in pieces:
        dense_bs[codes.token_n + (codes.img_i - 3) * 5, codes.feature_n] = codes.value_n
        assert (codes.feature_n * 55 + codes.token_n).diff().gt(0).all(), "by feature, then by token"
    assert torch.equal(dense_bs, expected_bs)


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 2**20))
def test_pieces_are_whole_images_and_blocks_are_bounded(n_imgs, n_patches, d_sae):
    images = piece_images(n_imgs, n_patches, d_sae, CPU)
    assert 1 <= images <= n_imgs
    assert images == 1 or images * n_patches * d_sae <= encoder.PIECE_CODES
    rows = block_tokens(images * n_patches, d_sae, CPU)
    assert 1 <= rows <= images * n_patches
    assert rows * d_sae <= encoder.BLOCK_CODES + d_sae


@given(batches(), st.sampled_from([1, 4, 9]))
def test_slots_do_not_depend_on_how_many_are_pruned_at_a_time(group, n_slots):
    def make() -> Slots:
        return Slots(D_SAE, 4, N_PATCHES, "patch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "PRUNED_SLOTS", n_slots)
        pruned = fold(make, group)
    assert same(pruned, fold(make, group))
