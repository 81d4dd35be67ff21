"""The laws, on every accumulator; then what each one is for, against loops."""

import functools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from saev_dist.accumulators import fixed_point, reconstruction, rows
from saev_dist.accumulators.base import Accumulator, Codes
from saev_dist.accumulators.bundle import Bundle
from saev_dist.accumulators.histogram import Histogram
from saev_dist.accumulators.moments import Moments
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.accumulators.topk import TopK
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.errors import MergeError
from saev_dist.sae.saev import load_saev
from saev_dist.statistics import make_bundle
from tests.laws import (
    D_MODEL,
    D_SAE,
    KINDS,
    N_PATCHES,
    as_dense,
    batches,
    contiguous,
    fold,
    make_codes,
    same,
    sliced,
    snapshot,
)
from tests.synthetic import brute_force_slots, make_acts, make_sae, make_shards

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_the_laws_are_held_against_all_that_runs_keep(tmp_path):
    """But for saev's percentile, which is no monoid: see its own tests."""
    shards, sae = make_shards(tmp_path / "shards", make_acts(2)), load_saev(make_sae(tmp_path / "sae.pt"))
    kept = make_bundle(Extract(shards=shards, sae=shards, out=shards, metrics=True), sae, Shards.open(shards)).parts
    assert set(map(type, kept.values())) <= {type(make()) for make in KINDS.values()}


@every_kind
def test_an_empty_state_can_be_made_without_memory(kind):
    """By which a run knows, before it starts, what its partials will hold."""
    with torch.device("meta"):
        made = KINDS[kind]().state_dict()
    for name, tensor in KINDS[kind]().state_dict().items():
        assert made[name].is_meta and (made[name].shape, made[name].dtype) == (tensor.shape, tensor.dtype)


@every_kind
def test_numbers_and_words_that_a_constructor_keeps_are_settings(kind):
    """So that states of other settings are not merged. What makes no difference to that is private."""
    acc = KINDS[kind]()
    kept = {name for name, value in vars(acc).items() if isinstance(value, int | float | str) and not name.startswith("_")}
    assert kept <= set(acc.SETTINGS)


def test_two_statistics_cannot_write_the_same():
    class Moment(Moments):
        def finalize(self, n_tokens):
            return {"metrics": {"l0": 1.0}}

    with pytest.raises(AssertionError, match="l0"):
        Bundle({"moments": Moments(D_SAE), "moment": Moment(D_SAE)}).finalize(1)
    with pytest.raises(AssertionError, match="sparsity"):
        Bundle({"moments": Moments(D_SAE), "again": Moments(D_SAE)}).finalize(1)


@every_kind
@given(batches())
def test_empty_is_the_identity(kind, group):
    acc = fold(KINDS[kind], group)
    assert same(acc.merge(KINDS[kind]()), acc)
    assert same(KINDS[kind]().merge(acc), acc)


@every_kind
@given(batches(), st.integers(0, 6), st.integers(0, 6))
def test_merge_is_associative_and_commutative(kind, group, i, j):
    i, j = sorted((i, j))
    a, b, c = (fold(KINDS[kind], part) for part in (group[:i], group[i:j], group[j:]))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(b), b.merge(a))


@every_kind
@given(batches(), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_state_does_not_depend_on_who_saw_what_in_which_order(kind, group, owners):
    parts = [[codes for codes, owner in zip(group, owners, strict=False) if owner == rank] for rank in range(3)]
    merged = functools.reduce(lambda a, b: a.merge(b), [fold(KINDS[kind], part) for part in parts])
    alone = fold(KINDS[kind], sorted(group, key=lambda codes: codes.img_i))
    assert same(merged, alone)


@every_kind
@given(batches(), batches())
def test_merge_leaves_its_operands_alone(kind, one, two):
    a, b = fold(KINDS[kind], one), fold(KINDS[kind], two)
    before = snapshot(a), snapshot(b)
    merged = a.merge(b)
    for tensor in merged.state_dict().values():
        tensor.fill_(7)
    for acc, state in zip((a, b), before, strict=True):
        assert all(torch.equal(acc.state_dict()[k], state[k]) for k in state)


@every_kind
@given(batches())
def test_state_survives_a_round_trip(kind, group):
    acc, other = fold(KINDS[kind], group[:3]), KINDS[kind]()
    other.load_state_dict(snapshot(acc))
    for codes in group[3:]:
        acc.update(codes)
        other.update(codes)
    assert same(acc, other)


@every_kind
@given(batches(), st.integers(0, 6), st.integers(0, 6))
def test_a_merged_state_goes_on_as_one_that_saw_it_all(kind, group, i, j):
    i, j = sorted((i, j))
    merged = fold(KINDS[kind], group[:i]).merge(fold(KINDS[kind], group[i:j]))
    for codes in group[j:]:
        merged.update(codes)
    assert same(merged, fold(KINDS[kind], group))


@every_kind
@given(batches(), st.integers(0, 6), st.floats(0, 1))
def test_merging_slices_is_slicing_the_merge(kind, group, i, cut):
    a, b = fold(KINDS[kind], group[:i]), fold(KINDS[kind], group[i:])
    for low, high in ((0, cut), (cut, 1)):
        assert same(sliced(a, low, high).merge(sliced(b, low, high)), sliced(a.merge(b), low, high))


@every_kind
def test_strangers_are_refused(kind):
    acc = KINDS[kind]()
    stranger = next(KINDS[other]() for other in KINDS if type(KINDS[other]()) is not type(acc))
    with pytest.raises(MergeError):
        acc.merge(stranger)
    with pytest.raises(MergeError):
        acc.load_state_dict({})
    first, *_ = state = acc.state_dict()
    with pytest.raises(MergeError):
        acc.load_state_dict(state | {first: torch.zeros(2, 9, 9, dtype=torch.float16)})


def test_states_of_other_sizes_or_settings_are_refused():
    with pytest.raises(MergeError):
        TopK(D_SAE, 4, N_PATCHES, "patch").merge(TopK(D_SAE, 3, N_PATCHES, "patch"))
    with pytest.raises(MergeError):
        TopK(D_SAE, 4, N_PATCHES, "patch").merge(TopK(D_SAE, 4, N_PATCHES, "image"))
    with pytest.raises(MergeError):
        TopK(D_SAE, 4, N_PATCHES, "patch").merge(TopK(D_SAE, 4, N_PATCHES + 1, "patch"))
    with pytest.raises(MergeError):
        Histogram(D_SAE, 90).merge(Histogram(D_SAE, 99))


@given(batches(), st.sampled_from(["patch", "image"]), st.integers(1, 7))
def test_slots_equal_a_brute_force_search(group, rank_by, top_k):
    group = contiguous(group)
    acc = fold(lambda: TopK(D_SAE, top_k, N_PATCHES, rank_by), group)
    found = acc.finalize(0)
    values, imgs, patches = brute_force_slots(as_dense(group), top_k, rank_by)
    assert np.array_equal(found["top_values"].numpy(), np.array(values, np.float32))
    assert found["top_img_i"].tolist() == imgs
    assert found["top_patch_i"].tolist() == patches


def test_places_beyond_32_bits_are_kept_exactly():
    n_patches, img_i = 4096, 2_000_000_000
    acc = TopK(2, 3, n_patches, "patch")
    codes = Codes(
        token_n=torch.tensor([4095, 4096 + 17]),
        feature_n=torch.tensor([1, 1]),
        value_n=torch.tensor([1.0, 1.0]),
        img_i=img_i,
        n_imgs=2,
        n_patches=n_patches,
        acts_bd=torch.zeros(2 * n_patches, 1),
    )
    acc.update(codes)
    found = acc.finalize(0)
    assert found["top_img_i"].tolist() == [[-1, -1, -1], [img_i, img_i + 1, -1]]
    assert found["top_patch_i"].tolist() == [[-1, -1, -1], [4095, 17, -1]]


@given(batches())
def test_moments_are_counts_and_means_of_what_is_above_zero(group):
    group = contiguous(group)
    dense = as_dense(group).reshape(-1, D_SAE)
    found = fold(lambda: Moments(D_SAE), group).finalize(max(1, len(dense)))
    for s in range(D_SAE):
        above = [float(v) for v in dense[:, s] if v > 0]
        assert found["sparsity"][s] == np.float32(len(above) / max(1, len(dense)))
        if above:
            assert found["mean_values"][s].item() == pytest.approx(math.fsum(above) / len(above), rel=1e-6, abs=1e-18)
        else:
            assert math.isnan(found["mean_values"][s])


@given(batches(), st.sampled_from([1, 2, rows.GROUPS]))
def test_image_means_are_the_mean_of_the_three_strongest_patches(group, n_groups):
    for codes in contiguous(group):
        dense = as_dense([codes])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "GROUPS", n_groups)
            counts, indices, means = rows.image_means(codes, D_SAE)
        found = np.zeros((codes.n_imgs, D_SAE), np.float32)
        found[np.repeat(np.arange(codes.n_imgs), counts), indices] = means
        assert counts.sum() == len(indices) == np.count_nonzero(found)
        expected = np.sort(dense, axis=1)[:, ::-1][:, :3].astype(np.float64).mean(axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(dense).max())


@pytest.mark.parametrize("max_places", [1, 2, rows.MAX_PLACES])
@pytest.mark.parametrize("lowest", [0.0, -1.0], ids=["above zero", "both"])
def test_image_means_of_features_that_are_in_few_or_all_of_many_patches(monkeypatch, max_places, lowest):
    monkeypatch.setattr(rows, "MAX_PLACES", max_places)
    n_imgs, n_patches = 5, 40
    random = np.random.default_rng(0)
    dense_eps = random.uniform(lowest, 1, (n_imgs, n_patches, D_SAE)).astype(np.float32).round(2)  # with ties
    dense_eps *= random.random((n_imgs, 1, D_SAE)) ** 2 > random.random(dense_eps.shape)
    dense_eps[:, :, 0] = random.uniform(0.5, 1, (n_imgs, n_patches))
    sizes = np.count_nonzero(dense_eps, axis=1)
    assert sizes.max() == n_patches > rows.MAX_PLACES and sizes.min() < 4
    dense_bs = torch.from_numpy(dense_eps).flatten(0, 1)
    feature_n, token_n = dense_bs.T.nonzero(as_tuple=True)
    codes = Codes(
        token_n=token_n, feature_n=feature_n, value_n=dense_bs[token_n, feature_n], img_i=0, n_imgs=n_imgs,
        n_patches=n_patches, acts_bd=dense_bs,
    )  # fmt: skip
    counts, indices, means = rows.image_means(codes, D_SAE)
    found = np.zeros((n_imgs, D_SAE), np.float32)
    found[np.repeat(np.arange(n_imgs), counts), indices] = means
    expected = np.sort(dense_eps, axis=1)[:, -3:].astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@given(batches(), st.integers(1, 7), st.integers(1, 5))
def test_samples_are_every_stride_th_token_of_the_whole(group, stride, n_features):
    group = contiguous(group)
    dense = as_dense(group).reshape(-1, D_SAE)
    found = [rows.sampled_values(codes, n_features, stride) for codes in group]
    if found:
        np.testing.assert_array_equal(np.concatenate(found), dense[::stride, :n_features])


@given(st.integers(1, 10**13), st.integers(1, 10**7))
def test_there_are_never_more_samples_than_asked_for(n_tokens, most):
    stride, n_samples = rows.sample_stride(n_tokens, most), rows.n_samples(n_tokens, most)
    assert n_samples <= most
    assert (n_samples - 1) * stride < n_tokens <= n_samples * stride
    assert stride == 1 or -(-n_tokens // (stride - 1)) > most


@given(batches())
def test_normalized_mse_equals_its_definition(group):
    if not group:
        return
    w_dec, b_dec = torch.arange(15.0).view(D_SAE, D_MODEL) / 3, torch.ones(D_MODEL)
    group = contiguous(group)
    x = torch.cat([codes.acts_bd for codes in group]).double()
    decoded = torch.from_numpy(as_dense(group).reshape(-1, D_SAE)).double() @ w_dec.double() + b_dec
    found: Accumulator = fold(lambda: Reconstruction(w_dec, b_dec), group)
    metrics = found.finalize(len(x))["metrics"]
    baseline = (x - x.mean(0)).square().sum().item()
    assert metrics["sse_baseline"] == pytest.approx(baseline, rel=1e-4, abs=1e-17 + 1e-9 * x.square().sum().item())
    assert metrics["sse_recon"] == pytest.approx((x - decoded).square().sum().item(), rel=1e-4, abs=1e-17)


def test_a_merged_reconstruction_undoes_the_norm_too():
    def make() -> Reconstruction:
        return Reconstruction(torch.ones(D_SAE, D_MODEL), torch.ones(D_MODEL), lambda decoded, x: 2 * decoded + x)

    codes = make_codes(3, [[[1.0, 0.0, 2.0, 0.0, 0.5]] * N_PATCHES])
    merged = make().merge(make())
    merged.update(codes)
    assert same(merged, fold(make, [codes]))
    assert merged.finalize(N_PATCHES)["metrics"]["sse_recon"] == pytest.approx(N_PATCHES * D_MODEL * 9.0**2)


def test_constant_activations_have_no_normalized_error():
    acc = fold(KINDS["reconstruction"], [make_codes(0, [[[0.0] * D_SAE] * N_PATCHES])])
    assert acc.finalize(N_PATCHES)["metrics"]["normalized_mse"] is None


def test_squares_of_integers_are_summed_exactly():
    n = 3_000
    codes = Codes(
        token_n=torch.arange(n), feature_n=torch.zeros(n, dtype=torch.int64), value_n=torch.ones(n), img_i=0, n_imgs=n,
        n_patches=1, acts_bd=torch.full((n, D_MODEL), 3001.0),
    )  # fmt: skip
    acc = Reconstruction(torch.ones(D_SAE, D_MODEL), torch.zeros(D_MODEL))
    acc.update(codes)
    assert fixed_point.to_fractions(acc.squares_12) == [n * D_MODEL * 3001**2]
    assert fixed_point.to_fractions(acc.errors_12) == [n * D_MODEL * 3000**2]
    assert fixed_point.to_fractions(acc.sum_d2) == [n * 3001] * D_MODEL


@pytest.mark.parametrize("n_parts", [1, 2, 3, 5, 40])
def test_the_decoder_is_read_in_parts_without_a_trace(monkeypatch, n_parts):
    """With integers, whose sums are exact in any order; of some parts and of some tokens there are no codes."""
    rng = np.random.default_rng(0)
    dense = rng.integers(-3, 4, (24, 40)) * (rng.random((24, 40)) < 0.6)
    dense[3:6], dense[:, 5:17] = 0, 0
    w_dec, b_dec, x = (
        torch.from_numpy(rng.integers(-9, 9, shape)).float() for shape in ((40, D_MODEL), D_MODEL, (24, D_MODEL))
    )
    feature_n, token_n = dense.T.nonzero()
    codes = Codes(
        token_n=torch.from_numpy(token_n), feature_n=torch.from_numpy(feature_n),
        value_n=torch.from_numpy(dense[token_n, feature_n]).float(), img_i=0, n_imgs=4, n_patches=6, acts_bd=x,
    )  # fmt: skip
    monkeypatch.setattr(reconstruction, "PART_BYTES", w_dec.nbytes // n_parts)
    monkeypatch.setattr(reconstruction, "CODES_IN_PART", 0.1)
    parts = []
    sum_rows = reconstruction._sum_rows
    monkeypatch.setattr(reconstruction, "_sum_rows", lambda *args: parts.append(len(args[3])) or sum_rows(*args))
    acc = Reconstruction(w_dec, b_dec)
    acc.update(codes)
    assert len(parts) == n_parts and sum(parts) == 40
    monkeypatch.setattr(reconstruction, "MOST_BYTES", w_dec.nbytes // n_parts - 1)  # where they would not fit the cache either
    parts.clear()
    Reconstruction(w_dec, b_dec).update(codes)
    assert parts == [40]
    expected = torch.from_numpy(dense).float() @ w_dec + b_dec - x
    assert fixed_point.to_fractions(acc.errors_12) == [int(expected.square().sum())]
    assert fixed_point.to_fractions(acc.sum_d2) == x.sum(0).int().tolist()


def test_a_features_sum_does_not_depend_on_the_other_features():
    """Whatever NumPy does at a time: its buffers hold 8,192 numbers."""
    random = torch.Generator().manual_seed(0)
    sums = []
    value_n = torch.rand(20_000, generator=random) ** 8
    for n_before in (0, 1, 5_000, 8_192):
        n = n_before + len(value_n)
        codes = Codes(
            token_n=torch.cat([torch.arange(n_before), torch.arange(len(value_n))]),
            feature_n=torch.cat([torch.zeros(n_before, dtype=torch.int64), torch.ones(len(value_n), dtype=torch.int64)]),
            value_n=torch.cat([torch.ones(n_before), value_n]),
            img_i=0, n_imgs=n, n_patches=1, acts_bd=torch.zeros(n, 1),
        )  # fmt: skip
        acc = Moments(2)
        acc.update(codes)
        sums.append(acc.sum_s2[1].tolist())
        assert fixed_point.to_float(acc.sum_s2)[1].item() == pytest.approx(value_n.double().sum().item(), rel=1e-14)
    assert sums == sums[:1] * 4
