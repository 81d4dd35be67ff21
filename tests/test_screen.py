"""`--screen bf16`: the bound holds, wherever it is hardest; codes are those of the fp32 product; runs are what they were."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as arrays

from saev_dist.cli import main
from saev_dist.config import Extract
from saev_dist.errors import ConfigError, RunError
from saev_dist.extract import run
from saev_dist.sae import pieces, screen
from saev_dist.sae import sieve as sieve_module
from saev_dist.sae.encoder import ActivationOverflow, Encoder
from saev_dist.sae.model import Gated, Given, GroupMax, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.sae.screen import Screen
from saev_dist.sae.sieve import CROWD, Margin
from saev_dist.world import World
from tests.ranks import artifact_hashes, run_ranks
from tests.synthetic import make_acts, make_sae, make_shards

CPU = torch.device("cpu")
SAEV = Path(__file__).parent / "data"
FIXTURES = {"saev-1.1/relu": 7, "saev-1.1/topk": 0, "saev-2.1/topk": 11, "saev-2.1/relu": 3, "saev-2.1/btopk": 1}


def shares(x_bd: torch.Tensor, w_ds: torch.Tensor, bias_s: torch.Tensor, threshold: float | torch.Tensor = 0.0) -> torch.Tensor:
    """How much of its margin each entry of the fast product takes up, off the exact value or off the fp32 one; (s, b)."""
    bounds, (d_sae, n_tokens) = Screen(w_ds, bias_s, threshold), (w_ds.shape[1], len(x_bd))
    fast_sb = torch.empty(d_sae, n_tokens, dtype=torch.bfloat16)
    margin = bounds.into(fast_sb, slice(0, d_sae), bounds.prepare(x_bd))
    assert len(margin.unknown_x) == 0
    nothing_b = ~x_bd.numpy().any(axis=1) & (not bias_s.any() and not torch.as_tensor(threshold).any())
    assert ((margin.absolute_b >= 2.0**-110) | nothing_b).all()
    assert not margin.absolute_b[nothing_b].any()
    everything = np.arange(n_tokens * d_sae)
    candidates = everything % n_tokens, everything // n_tokens, np.full(len(everything), np.inf, np.float32)
    fp32_sb = torch.from_numpy(bounds.recompute(candidates, x_bd)[2]).view(d_sae, n_tokens).double()
    exact_sb = w_ds.double().T @ x_bd.double().T + bias_s.double()[:, None]
    off_sb = torch.stack(
        [fast_sb.double() - (truth_sb - torch.as_tensor(threshold).double().view(-1, 1)) for truth_sb in (fp32_sb, exact_sb)]
    )
    off_sb, margin_sb = off_sb.abs().amax(dim=0), torch.from_numpy(margin.at(fast_sb.float().numpy(), slice(None))).double()
    return torch.where((off_sb == 0) & (margin_sb == 0), 0.0, off_sb / margin_sb)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e15])
@pytest.mark.parametrize("bias", [0.0, 1.0, -3e4])
@pytest.mark.parametrize("d_model", [1, 6, 33, 768])
def test_the_bound_holds(size, bias, d_model):
    random = torch.Generator().manual_seed(d_model)
    x_bd = torch.randn(50, d_model, generator=random) * size * torch.rand(50, 1, generator=random)
    w_ds = torch.randn(d_model, 40, generator=random) * 10 ** torch.randn(40, generator=random)
    bias_s = bias * (1 + torch.rand(40, generator=random))
    assert shares(x_bd, w_ds, bias_s).max() < 1
    assert shares(x_bd, w_ds, bias_s, torch.rand(40, generator=random)).max() < 1


def test_the_bound_is_nearly_reached_where_every_rounding_goes_one_way():
    """1 + 2^-8 is half way between two bfloat16 numbers, and 1 is the even one: all terms lose the most that they can."""
    x_bd, w_ds = torch.full((3, 768), 1 + 2.0**-8), torch.full((768, 5), 1 + 2.0**-8)
    assert 0.6 < shares(x_bd, w_ds, torch.zeros(5)).max() < 1
    assert shares(torch.full((3, 768), 1 + 2.0**-7), torch.full((768, 5), 1 + 2.0**-7), torch.zeros(5)).max() < 1


def test_the_bound_covers_offsets_that_the_product_takes_for_zero():
    assert shares(torch.zeros(3, 8), torch.ones(8, 4), torch.full((4,), 1e-40)).max() < 1


@pytest.mark.parametrize("swap", [False, True])
def test_the_bound_covers_the_float32_sums(swap):
    """2^24, then halves that it swallows one by one, then -2^24; exact in bfloat16, so nothing else is rounded."""
    x_bd, w_ds = torch.ones(1, 768), torch.full((768, 1), 0.5)
    x_bd[0, [0, -1]], w_ds[[0, -1], 0] = 2.0**12, torch.tensor([2.0**12, -(2.0**12)])
    if swap:  # for sums that run over many columns side by side
        x_bd[0, [1, 16]], x_bd[0, -1], w_ds[[1, 16], 0], w_ds[-1, 0] = 2.0**12, 1, -(2.0**12), 0.5
    assert 0 < shares(x_bd, w_ds, torch.zeros(1)).max() < 1


def test_the_bound_covers_large_offsets_that_cancel():
    """A bias takes the product away, or a threshold the bias: what is left is the rounding of large numbers."""
    random = torch.Generator().manual_seed(0)
    large_s = 1e6 * (1 + torch.rand(2_000, generator=random))
    high_s = large_s.bfloat16().float()
    parts_ds = torch.stack([high_s, (large_s - high_s).bfloat16().float()])  # the columns that the bias will have
    for one in range(0, 2_000, 100):
        part = slice(one, one + 100)
        assert 0 < shares(torch.ones(1, 2), -parts_ds[:, part], large_s[part]).max() < 1
        assert 0 < shares(torch.full((1, 1), 0.3), torch.full((1, 100), 0.7), large_s[part], large_s[part]).max() < 1


@pytest.mark.parametrize("kind", [Relu(), TopK(3), GroupMax(8)], ids=str)
def test_what_could_overflow_is_refused_and_never_lost(kind):
    sae = Sae(
        w_enc_ds=torch.full((4, 200), 1e-3), b_enc_s=torch.zeros(200), w_dec_sd=torch.ones(200, 4), b_dec_d=torch.zeros(4),
        activation=kind, pre_bias=False, source="",
    )  # fmt: skip
    for bias, value, fine in ((0.0, 8e37, True), (0.0, 9e37, False), (8.5e37, 3e38, False), (8.5e37, 8e37, False)):
        plain, screened = (
            Encoder(replace(sae, b_enc_s=torch.full((200,), bias)), CPU, "fp32", 1, screen=how) for how in (False, True)
        )
        acts_bd = torch.full((1, 4), value)
        with plain, screened:
            if fine:
                expected = plain.encode(acts_bd, img_i=0, n_patches=1)
                assert torch.equal(screened.encode(acts_bd, img_i=0, n_patches=1).feature_n, expected.feature_n)
            else:
                for encoder in (plain, screened):
                    with pytest.raises(ActivationOverflow):
                        encoder.encode(acts_bd, img_i=0, n_patches=1)


@pytest.mark.parametrize("kind", [Relu(), TopK(7), GroupMax(8), Threshold(1e5)], ids=str)
@pytest.mark.parametrize("loud", ["norm", "bias"])
def test_loud_features_have_the_codes_of_fp32(kind, loud):
    """One in 64 is much larger than the others."""
    w_ds, bias_s = close_ones(D_MODEL, 512, 1).T.contiguous(), torch.arange(512) % 3 * 301.0
    if loud == "norm":
        w_ds[:, 5::64] *= 2.0**12  # exact still, as are the sums with the bias
        bias_s[5::64] *= 2.0**12
    else:
        bias_s[5::64] = -(2.0**40)
    sae = Sae(
        w_enc_ds=w_ds, b_enc_s=bias_s, w_dec_sd=w_ds.T, b_dec_d=torch.zeros(D_MODEL), activation=kind, pre_bias=False,
        source="integers",
    )  # fmt: skip
    acts_bd = torch.cat([close_ones(D_MODEL, 20, 1), -close_ones(D_MODEL, 20, 2), close_ones(D_MODEL, 20, 3)])
    found = []
    for screened in (False, True):
        with Encoder(sae, CPU, "fp32", 1, screen=screened) as one:
            found.append(one.encode(acts_bd, img_i=0, n_patches=5))
    for name in ("token_n", "feature_n", "value_n"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


@pytest.mark.parametrize("kind", [TopK(16), Threshold(2.0)], ids=str)
@pytest.mark.parametrize("loud", ["norm", "bias"])
def test_loud_features_do_not_swell_the_bounds_of_others(kind, loud):
    random = torch.Generator().manual_seed(0)
    w_ds, bias_s, acts_bd = torch.randn(48, 512, generator=random) / 7, torch.zeros(512), torch.randn(100, 48, generator=random)
    recomputed = []
    for is_loud in (False, True):
        if is_loud and loud == "norm":
            w_ds[:, 5::64] *= 1e5
        elif is_loud:
            bias_s[5::64] = -1e8
        sae = Sae(
            w_enc_ds=w_ds, b_enc_s=bias_s, w_dec_sd=w_ds.T, b_dec_d=torch.zeros(48), activation=kind, pre_bias=False, source=""
        )
        with Encoder(sae, CPU, "fp32", 1, screen=True) as one:
            one.encode(acts_bd, img_i=0, n_patches=5)
        recomputed.append(one.recomputed_per_token)
    calm, noisy = recomputed
    assert 8 < calm < 64
    assert noisy < calm + 20, "8 loud ones of 512, which are always made again"


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@given(arrays.arrays("float32", (3, 4), elements=FLOATS), arrays.arrays("float32", (4, 5), elements=FLOATS), FLOATS)
def test_the_bound_holds_for_any_numbers(x_bd, w_ds, bias):
    assert shares(torch.from_numpy(x_bd), torch.from_numpy(w_ds), torch.full((5,), bias)).max() < 1


@given(st.floats(2.0**-110, 2.0**60, width=32), FLOATS, st.sampled_from([2.0**-8, 2.0**-2]))
def test_no_more_than_a_margin_is_cut_off(absolute, bound, relative):
    margin = Margin(np.full(1, absolute, np.float32), relative, np.empty(0, np.int64))
    h = Fraction(float(margin.cut(np.float32(bound))[0]))  # the largest that is cut off
    spare = 1 - Fraction(2) ** -20
    assert h + Fraction(absolute) * spare + (Fraction(relative) * spare - Fraction(2) ** -20) * abs(h) <= Fraction(bound)


def close_ones(d_model: int, n: int, seed: int) -> torch.Tensor:
    """Integers whose sums are exact in float32, but which bfloat16 cannot tell apart; (n, d_model)."""
    random = np.random.default_rng(seed)
    base = random.integers(-300, 300, d_model)
    return torch.from_numpy(base + random.integers(-1, 2, (n, d_model)) * (random.random((n, d_model)) < 0.1)).float()


D_MODEL, D_SAE = 16, 96
KINDS = [
    Relu(), TopK(1), TopK(7), TopK(7, relu=True), TopK(95), TopK(500), GroupMax(8), Threshold(1e5), Threshold(-1.0),
    Threshold(torch.arange(D_SAE) * 3000.0), Gated(torch.arange(1, D_SAE + 1) / 32, torch.arange(D_SAE) * 5.0 - 100),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{getattr(kind, 'k', '')}")
@pytest.mark.parametrize("block_features", [16, 768])
@pytest.mark.parametrize("often", [False, True])
def test_codes_are_those_of_fp32_to_the_bit_where_all_but_tie(monkeypatch, kind, block_features, often):
    monkeypatch.setattr(pieces, "BLOCK_FEATURES", block_features)
    if often:
        monkeypatch.setattr(sieve_module, "MAX_FEATURES_UNSEEN", 1)
        monkeypatch.setattr(sieve_module, "CROWD", 0)
    norm = Given(torch.ones(D_MODEL), 2.0) if isinstance(kind, Relu) else None
    sae = Sae(
        w_enc_ds=close_ones(D_MODEL, D_SAE, 1).T.contiguous(), b_enc_s=torch.arange(D_SAE) % 3 * 301.0,
        w_dec_sd=torch.zeros(D_SAE, D_MODEL), b_dec_d=torch.ones(D_MODEL), activation=kind, pre_bias=True,
        input_norm=norm, source="integers",
    )  # fmt: skip
    acts_bd = close_ones(D_MODEL, 40, 1)  # near the features, so that all scores are large and near each other
    assert len({*(acts_bd @ sae.w_enc_ds).bfloat16().flatten().tolist()}) < len({*(acts_bd @ sae.w_enc_ds).flatten().tolist()})
    found = []
    for screened in (False, True):
        with Encoder(sae, CPU, "fp32", 1, screen=screened) as one:
            found.append(one.encode(acts_bd, img_i=0, n_patches=5))
    exact, screened = found
    assert len(exact.value_n) > 0
    for name in ("token_n", "feature_n", "value_n"):
        assert torch.equal(getattr(exact, name), getattr(screened, name))


@pytest.mark.parametrize("kind", [Relu(), TopK(7), GroupMax(8)], ids=str)
@pytest.mark.parametrize("norm", [None, LayerNorm()], ids=str)
def test_bits_do_not_depend_on_blocks_pieces_and_threads(monkeypatch, kind, norm):
    random = torch.Generator().manual_seed(0)
    w_ds = torch.randn(48, D_SAE, generator=random)
    sae = Sae(
        w_enc_ds=w_ds, b_enc_s=torch.randn(D_SAE, generator=random), w_dec_sd=w_ds.T, b_dec_d=torch.zeros(48), activation=kind,
        pre_bias=False, input_norm=norm, source="gauss",
    )  # fmt: skip
    acts_bd = torch.randn(55, 48, generator=random)
    dense = []
    for block_tokens, block_features, n_threads in ((2048, 768, 1), (7, 32, 2), (64, 1, 3)):
        monkeypatch.setattr(pieces, "BLOCK_TOKENS", block_tokens)
        monkeypatch.setattr(pieces, "BLOCK_FEATURES", block_features)
        dense_bs = torch.zeros(55, D_SAE)
        with Encoder(sae, CPU, "fp32", n_threads, screen=True) as one:
            for codes in [codes.result() for codes in one.submit_batch(acts_bd, img_i=0, n_patches=5)]:
                dense_bs[codes.token_n + codes.img_i * 5, codes.feature_n] = codes.value_n
        dense.append(dense_bs)
    assert torch.equal(dense[0], dense[1])
    assert torch.equal(dense[0], dense[2])
    x_bd = norm.apply(acts_bd) if norm else acts_bd
    at = dense[0].nonzero(as_tuple=True)
    expected_bs = x_bd.double() @ w_ds.double() + sae.b_enc_s.double()
    torch.testing.assert_close(dense[0][at].double(), expected_bs[at], rtol=1e-5, atol=1e-5)


def test_a_token_without_codes_and_one_that_is_zero():
    sae = Sae(
        w_enc_ds=torch.ones(4, 32), b_enc_s=torch.full((32,), -1.0), w_dec_sd=torch.ones(32, 4), b_dec_d=torch.zeros(4),
        activation=Relu(), pre_bias=False, source="",
    )  # fmt: skip
    with Encoder(sae, CPU, "fp32", 1, screen=True) as one:
        assert len(one.encode(torch.zeros(3, 4), img_i=0, n_patches=3).value_n) == 0


@pytest.mark.parametrize(("kind", "most"), [(TopK(4), CROWD * 4 + 4), (GroupMax(4), 0), (Relu(), 0)], ids=str)
def test_of_zero_tokens_little_is_computed_again(kind, most):
    w_ds = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    sae = Sae(
        w_enc_ds=w_ds, b_enc_s=torch.zeros(512), w_dec_sd=w_ds.T, b_dec_d=torch.zeros(16), activation=kind, pre_bias=False,
        source="",
    )  # fmt: skip
    with Encoder(sae, CPU, "fp32", 1, screen=True) as one:
        assert len(one.encode(torch.zeros(100, 16), img_i=0, n_patches=5).value_n) == 0
    assert one.recomputed_per_token <= most


@pytest.mark.parametrize(("rate", "pays"), [(0.5, False), (1.7, True)])
def test_a_machine_on_which_it_does_not_pay_is_said(tmp_path, monkeypatch, capsys, rate, pays):
    assert screen.speedup(96) > 0
    monkeypatch.setattr(screen, "speedup", lambda d_model: rate)
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    run(Extract(shards=shards, sae=sae, out=tmp_path / "run", screen="bf16", dry_run=True))
    assert ("in bfloat16 0.5 times as fast as in fp32, which does not pay." in capsys.readouterr().err) != pays


def test_a_product_that_is_worse_than_the_bound_stops_the_run(monkeypatch):
    monkeypatch.setattr(screen, "ROOM", -1.0)
    monkeypatch.setattr(screen, "RELATIVE", 0.0)
    random = torch.Generator().manual_seed(0)
    w_ds = torch.randn(48, D_SAE, generator=random)
    sae = Sae(
        w_enc_ds=w_ds, b_enc_s=torch.zeros(D_SAE), w_dec_sd=w_ds.T, b_dec_d=torch.zeros(48), activation=Relu(),
        pre_bias=False, source="",
    )  # fmt: skip
    with (
        Encoder(sae, CPU, "fp32", 1, screen=True) as one,
        pytest.raises(RunError, match=r"code of feature \d+ is .*Run without --screen"),
    ):
        one.encode(torch.randn(20, 48, generator=random), img_i=0, n_patches=5)


def test_weights_beyond_bfloat16_are_refused():
    with pytest.raises(ConfigError, match="too large for bfloat16"):
        Screen(torch.full((2, 3), 3.4e38), torch.zeros(3), 0.0)


@pytest.mark.parametrize("name", FIXTURES)
def test_slots_are_those_of_fp32_on_the_fixtures(tmp_path, name):
    source = SAEV / name
    for how in ("none", "bf16"):
        run(
            Extract(
                shards=source / "shards", sae=source / "sae.pt", out=tmp_path / how, layer=FIXTURES[name], screen=how,
                progress=False,
            )
        )  # fmt: skip
    for stem in ("top_img_i", "top_patch_i", "sparsity"):
        exact, screened = (torch.load(tmp_path / how / f"{stem}.pt", weights_only=True) for how in ("none", "bf16"))
        assert torch.equal(exact, screened), stem
    exact, screened = (torch.load(tmp_path / how / "top_values.pt", weights_only=True) for how in ("none", "bf16"))
    torch.testing.assert_close(exact, screened, rtol=1e-5, atol=1e-5)
    manifest = json.loads((tmp_path / "bf16/manifest.json").read_text())
    assert manifest["identity"]["screen"] == "bf16"
    assert manifest["ranks"][0]["recomputed_per_token"] >= manifest["metrics"]["l0"]
    main(["verify", "--run", str(tmp_path / "bf16"), "--all", "--no-progress"])


def test_a_gpu_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "device", lambda *_: torch.device("cuda"))
    source = SAEV / "saev-2.1/topk"
    with pytest.raises(ConfigError, match="--screen bf16 is for the CPU; this run is on cuda"):
        run(Extract(shards=source / "shards", sae=source / "sae.pt", out=tmp_path / "run", layer=11, screen="bf16"))
    assert not (tmp_path / "run").exists()


def test_a_screened_run_of_integers_is_the_fp32_one_on_any_number_of_ranks(tmp_path):
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    run(Extract(shards=shards, sae=sae, out=tmp_path / "fp32", top_k=8, batch_tokens=15, progress=False))
    args = ["--shards", shards, "--sae", sae, "--top-k", 8, "--batch-tokens", 15, "--screen", "bf16", "--no-progress"]
    for n_ranks in (1, 3):
        done = run_ranks("extract", *args, "--out", tmp_path / f"run{n_ranks}", n_ranks=n_ranks)
        assert done.returncode == 0, done.stderr
        assert artifact_hashes(tmp_path / f"run{n_ranks}") == artifact_hashes(tmp_path / "fp32")
