"""The CPU's sieve against torch's whole blocks, and both against a loop; pieces and blocks against whole batches."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays

from saev_dist.accumulators import topk
from saev_dist.accumulators.base import stable_order
from saev_dist.accumulators.topk import TopK as Slots
from saev_dist.sae import pieces, select
from saev_dist.sae import sieve as sieve_module
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.model import Activation, GroupMax, Relu, Sae, Threshold, TopK
from saev_dist.sae.sieve import CROWD, Candidates, Margin, Sieve, keep
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
@given(
    block=BLOCKS,
    step=st.sampled_from([3, 6, 12]),
    spread=st.sampled_from([0.0, 0.3, 2.0]),
    often=st.booleans(),
    is_bf16=st.booleans(),
)
def test_the_sieve_and_whole_blocks_keep_what_a_loop_keeps(kind, block, step, spread, often, is_bf16):
    """The sieve also where it knows the entries only up to a margin, and where they are bfloat16."""
    h_bs, threshold = torch.from_numpy(block), kind.threshold if isinstance(kind, Threshold) else 0.0
    expected = [b * 12 + s for b, row in enumerate(block.tolist()) for s in by_loop(row, kind)]
    token_n, feature_n, value_n = select.select_at_once(h_bs, kind, threshold)
    assert (token_n * 12 + feature_n).tolist() == expected
    assert torch.equal(value_n, h_bs[token_n, feature_n])
    with pytest.MonkeyPatch.context() as patch:
        if often:  # bars rise and losers are forgotten at every block
            patch.setattr(sieve_module, "MAX_FEATURES_UNSEEN", 1)
            patch.setattr(sieve_module, "CROWD", 0)

        def exact(held: Candidates) -> Candidates:
            return held[0], held[1], block[held[0], held[1]]

        sieve = Sieve(kind, threshold, len(block), 12, exact if spread else None)
        random = np.random.default_rng(0)
        margin = Margin(
            random.random(len(block), np.float32) * np.float32(spread), 2.0**-8, np.array([1][: int(spread)], np.int64)
        )
        margin.absolute_b[~block.any(axis=1)] = 0  # zeros may be known exactly
        noise = random.uniform(-0.99, 0.99, block.T.shape) * margin.at(block.T, slice(None))
        if is_bf16:
            noise *= 0.49  # rounding may add as much
        for first in range(0, 12, step):
            rows = slice(first, first + step)
            h_cb = torch.from_numpy((block.T + noise * bool(spread)).astype(np.float32)[rows])
            h_cb = (h_cb.bfloat16().view(torch.int16) if is_bf16 else h_cb).contiguous()
            sieve.take(first, h_cb.numpy(), margin if spread else None)
        token_n, feature_n, _ = sieve.candidates()
    assert (np.diff(feature_n * len(block) + token_n) > 0).all(), "by feature, then by token"
    value_n = block[token_n, feature_n]
    kept_n = keep(kind, threshold, (token_n, feature_n, value_n), len(block), 12)
    assert sorted((token_n * 12 + feature_n)[kept_n]) == expected
    assert (np.diff(kept_n) > 0).all()


@given(
    arrays.arrays("int16", (4, 6), elements=st.sampled_from([0, -0x8000]) | st.integers(-0x8000, 0x7FFF)).filter(
        lambda bits: ((bits & 0x7F80) != 0x7F80).all()  # finite
    ),
    arrays.arrays(
        "float32",
        st.sampled_from([(6,), (4, 1), ()]),
        elements=st.sampled_from([0.0, -0.0]) | st.floats(width=32, allow_nan=False),
    ),
    st.booleans(),
)
def test_bfloat16_is_compared_as_its_bits(bits, bound, is_near):
    h_cw = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    if is_near:  # to an entry: next below, equal, or next above
        bound = np.nextafter(h_cw[0], np.float32([-np.inf, np.inf] * 3)) if bound.shape == (6,) else h_cw[:, :1].copy()
    mask_cw = np.empty((4, 6), dtype=bool)
    sieve_module._exceed(bits, bound, mask_cw)
    assert (mask_cw == (h_cw > bound)).all()
    assert (sieve_module._floats(bits) == h_cw).all()


def ascending(n_tokens: int) -> np.ndarray:
    """Each feature beats all before it; (s, b)."""
    return np.arange(1_000, dtype=np.float32)[:, None].repeat(n_tokens, axis=1)


def one_tied(n_tokens: int) -> np.ndarray:
    """Distinct scores, but for one token's."""
    h_sb = np.random.default_rng(0).permutation(1_000 * n_tokens).astype(np.float32).reshape(1_000, n_tokens)
    h_sb[:, 3] = 7
    return h_sb


HARD = {
    "ascending": ascending(40),
    "zeros": np.zeros((1_000, 40), np.float32),
    "equal": np.full((1_000, 40), 3, np.float32),
    "negative": np.full((1_000, 40), -3, np.float32),
    "zeros above negatives": np.repeat(np.float32([[-1], [0], [-2], [0]]), 250, axis=0).repeat(40, axis=1),
    "one tied": one_tied(40),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", [TopK(2), TopK(5), GroupMax(5)], ids=str)
@pytest.mark.parametrize("spread", [None, 0.25, 2e6], ids=["exact", "margin", "unknowable"])
def test_a_token_holds_few_candidates_however_many_tie(monkeypatch, name, kind, spread):
    """Nor are more noted at a time, made exact at a time, or laid out in a table as wide as what one token has."""
    h_sb = HARD[name]
    n_tokens, most, n_noted, n_made_exact, table_widths = h_sb.shape[1], CROWD * kind.k, [0], [0], [0]
    where, table = sieve_module._where, sieve_module._table

    def where_counted(mask_cw, most):
        flat_n = where(mask_cw, most)
        n_noted.append(0 if flat_n is None else len(flat_n))
        return flat_n

    def table_measured(*args):
        table_bw, column_n = table(*args)
        if len(table_bw) == n_tokens:
            table_widths.append(table_bw.shape[1])
        return table_bw, column_n

    def exact(held):
        n_made_exact.append(len(held[0]))
        return held[0], held[1], h_sb[held[1], held[0]]

    monkeypatch.setattr(sieve_module, "_where", where_counted)
    monkeypatch.setattr(sieve_module, "_table", table_measured)
    margin = Margin(np.full(n_tokens, spread, np.float32), 0.0, np.empty(0, np.int64)) if spread else None
    sieve = Sieve(kind, 0.0, n_tokens, 1_000, exact if margin else None)
    for first in range(0, 1_000, 200):
        sieve.take(first, h_sb[first : first + 200].copy(), margin)
        assert np.bincount(np.concatenate([token_n for token_n, _, _ in sieve._found])).max(initial=0) <= most
    noted_at_a_time = most if isinstance(kind, TopK) else 200  # no group lies in two blocks
    assert max(n_noted) <= noted_at_a_time * n_tokens
    assert max(n_made_exact) <= (most + noted_at_a_time) * n_tokens
    if name == "one tied" and spread is None:
        assert max(table_widths) <= most + kind.k
    if name in ("zeros", "negative") and isinstance(kind, GroupMax) and spread is None:
        assert max(n_noted) == 0
    candidates = exact(sieve.candidates())
    kept_n = keep(kind, 0.0, candidates, n_tokens, 1_000)
    expected = {(b, s) for b, row in enumerate(h_sb.T.tolist()) for s in by_loop(row, kind)}
    assert {*zip(candidates[0][kept_n].tolist(), candidates[1][kept_n].tolist(), strict=True)} == expected


@given(st.lists(st.integers(0, 2**33 - 1), max_size=30), st.integers(1, 7))
def test_the_order_is_stable_for_keys_of_any_size(keys, step):
    keys = [key // step * step for key in keys]
    assert stable_order(torch.tensor(keys, dtype=torch.int64), 2**33).tolist() == sorted(range(len(keys)), key=keys.__getitem__)


@pytest.mark.parametrize("kind", [Relu(), TopK(4)], ids=str)
@pytest.mark.parametrize(
    ("piece_codes", "block_tokens", "block_features"),
    [(1, 2048, 768), (100, 2048, 16), (1, 2, 16), (10**6, 7, 32), (10**6, 64, 1)],
)
def test_codes_do_not_depend_on_pieces_and_blocks(monkeypatch, kind, piece_codes, block_tokens, block_features):
    weights = make_weights()
    sae = Sae(**weights, activation=kind, pre_bias=False, source="integers")
    acts_bd = torch.from_numpy(make_acts(11)).view(-1, sae.d_model)
    with Encoder(sae, CPU, "fp32", 1) as whole:
        expected = whole.encode(acts_bd, img_i=3, n_patches=5)
    monkeypatch.setattr(pieces, "PIECE_CODES", piece_codes)
    monkeypatch.setattr(pieces, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(pieces, "BLOCK_FEATURES", block_features)
    with Encoder(sae, CPU, "fp32", 2) as cut:
        parts = [codes.result() for codes in cut.submit_batch(acts_bd, img_i=3, n_patches=5)]
    assert (len(parts) == 1) == (piece_codes == 10**6 and block_tokens >= 55)
    dense_bs, expected_bs = torch.zeros(55, sae.d_sae), torch.zeros(55, sae.d_sae)
    expected_bs[expected.token_n, expected.feature_n] = expected.value_n
    for codes in parts:
        dense_bs[codes.token_n + (codes.img_i - 3) * 5, codes.feature_n] = codes.value_n
        assert (codes.feature_n * 55 + codes.token_n).diff().gt(0).all(), "by feature, then by token"
    assert torch.equal(dense_bs, expected_bs)


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 2**20), st.integers(0, 64))
def test_pieces_are_whole_images_and_blocks_are_bounded(n_imgs, n_patches, d_sae, k):
    d_sae = -(-d_sae // k) * k if k else d_sae
    kind = GroupMax(k) if k else TopK(n_patches) if n_imgs % 2 else Relu()
    images = pieces.piece_images(n_imgs, n_patches, kind, d_sae, CPU)
    assert 1 <= images <= n_imgs
    assert images == 1 or images * n_patches <= pieces.BLOCK_TOKENS
    per_token = d_sae if isinstance(kind, Relu) else min(kind.k, d_sae)
    assert images == 1 or images * n_patches * per_token <= pieces.PIECE_CODES
    tokens, first, features = pieces.block_shape(images * n_patches, kind, d_sae, CPU)
    assert first == (min(d_sae, pieces.FIRST_BLOCKS * features) if isinstance(kind, TopK) else features)
    assert 1 <= tokens <= images * n_patches
    assert 1 <= features <= d_sae
    assert tokens * features <= max(pieces.BLOCK_TOKENS * pieces.BLOCK_FEATURES, features)
    assert features == d_sae or features % (d_sae // k if k else 16) == 0


@given(batches(), st.sampled_from([1, 4, 9]))
def test_slots_do_not_depend_on_how_many_are_pruned_at_a_time(group, n_slots):
    def make() -> Slots:
        return Slots(D_SAE, 4, N_PATCHES, "patch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "PRUNED_SLOTS", n_slots)
        pruned = fold(make, group)
    assert same(pruned, fold(make, group))
