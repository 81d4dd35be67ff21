"""What the encoder promises of a score: how large activations may be, how far rounding may move it, what lifts it."""

import math
from dataclasses import replace

import pytest
import torch

from saev_dist.errors import CheckpointError
from saev_dist.sae import encoder, pieces
from saev_dist.sae.encoder import ActivationOverflow, Encoder
from saev_dist.sae.model import ConstantNorm, Gated, Given, GroupMax, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.sae.product import NumpyProduct, TorchProduct

CPU = torch.device("cpu")
D_MODEL, D_SAE = 6, 40


def make_sae(**fields) -> Sae:
    random = torch.Generator().manual_seed(0)
    return Sae(
        **{
            "w_enc_ds": torch.randn(D_MODEL, D_SAE, generator=random),
            "b_enc_s": torch.randn(D_SAE, generator=random),
            "w_dec_sd": torch.randn(D_SAE, D_MODEL, generator=random),
            "b_dec_d": torch.zeros(D_MODEL),
            "activation": Relu(),
            "pre_bias": False,
            "source": "",
        }
        | fields
    )


def encode(sae: Sae, acts_bd: torch.Tensor, **settings) -> torch.Tensor:
    """Codes as a table, (b, s)."""
    with Encoder(sae, CPU, "fp32", 1) as encoder:
        codes = encoder.submit(acts_bd, img_i=0, n_patches=1, **settings).result()
    table_bs = torch.zeros(len(acts_bd), D_SAE)
    table_bs[codes.token_n, codes.feature_n] = codes.value_n
    return table_bs


GATED = Gated(torch.linspace(0.5, 1e6, D_SAE), torch.linspace(-1, 1, D_SAE))
UNBOUNDED = [Relu(), TopK(3), Threshold(1.0), GATED]


@pytest.mark.parametrize("activation", UNBOUNDED, ids=str)
def test_no_finite_activation_gives_a_score_that_is_not(activation):
    """Growing by a little each time: either the scores are finite, or the activations are refused."""
    sae = make_sae(activation=activation)
    acts_bd = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))
    refused = []
    for exponent in range(100, 128):
        large_bd = acts_bd / acts_bd.abs().max() * 1.9 * 2.0**exponent
        try:
            assert torch.isfinite(encode(sae, large_bd)).all()
            refused.append(False)
        except ActivationOverflow:
            refused.append(True)
    assert refused == sorted(refused) and refused[-1] and not refused[0]
    # no earlier than some factor of 16 below where a score would really overflow
    gain = float((sae.w_enc_ds.abs().sum(dim=0) * (activation.scale_s.clamp(min=1) if activation is GATED else 1)).max())
    assert 2.0 ** (100 + refused.index(True)) * gain > 2.0**123


def test_bias_counts_towards_the_largest_score():
    sae = make_sae(b_enc_s=torch.full((D_SAE,), 8e37))
    with pytest.raises(ActivationOverflow):
        encode(sae, torch.full((1, D_MODEL), 1e37))
    assert torch.isfinite(encode(sae, torch.ones(1, D_MODEL))).all()


def test_weights_are_folded_a_few_features_at_a_time(monkeypatch):
    """The float64 copy of all of them would be twice the SAE."""
    sae = make_sae(pre_bias=True, b_dec_d=torch.linspace(-3, 4, D_MODEL), input_norm=Given(torch.linspace(2, 5, D_MODEL), 0.5))
    acts_bd = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(1))
    x_bd = (acts_bd.double() - sae.input_norm.mean_d) * 0.5 - sae.b_dec_d
    expected_bs = (x_bd @ sae.w_enc_ds.double() + sae.b_enc_s).relu()
    for n_features in (3, 4096):
        monkeypatch.setattr(encoder, "FOLD_FEATURES", n_features)
        torch.testing.assert_close(encode(sae, acts_bd).double(), expected_bs, rtol=1e-5, atol=1e-5)


def test_an_sae_whose_own_numbers_are_too_large_is_refused_itself():
    """And not the activations for what no activation can mend."""
    for sae in (
        make_sae(b_enc_s=torch.full((D_SAE,), torch.finfo(torch.float32).min)),
        make_sae(activation=replace(GATED, b_mag_s=torch.full((D_SAE,), 3e38))),
    ):
        with pytest.raises(CheckpointError, match="has biases up to 3"):
            encode(sae, torch.ones(1, D_MODEL))


@pytest.mark.parametrize("norm", [LayerNorm(), ConstantNorm()], ids=["layer", "constant"])
def test_tokens_that_are_normalised_may_be_as_large_as_they_like_and_weights_may_not(norm):
    acts_bd = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(1))
    sae = make_sae(input_norm=norm)
    torch.testing.assert_close(encode(sae, acts_bd * 2.0**120), encode(sae, acts_bd * 2.0**60))
    # weights that no token of norm sqrt(d) may meet
    with pytest.raises(CheckpointError, match="whose weights add up to"):
        encode(make_sae(input_norm=norm, w_enc_ds=torch.full((D_MODEL, D_SAE), 5e37)), acts_bd)


@pytest.mark.parametrize("activation", [Relu(), Gated(torch.linspace(0.5, 4, D_SAE), torch.linspace(-20, 20, D_SAE))], ids=str)
@pytest.mark.parametrize(
    "norm", [None, Given(torch.linspace(-40, 40, D_MODEL), -3.0), LayerNorm()], ids=["raw", "given", "layer"]
)
def test_the_magnitude_is_the_sum_of_those_of_a_scores_terms(activation, norm):
    sae = make_sae(activation=activation, input_norm=norm, pre_bias=True, b_dec_d=torch.linspace(30, -30, D_MODEL))
    acts_nd, feature_n = torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(1)), torch.arange(D_SAE)
    x_nd, shift_d = acts_nd.double(), sae.b_dec_d.double().abs()
    if isinstance(norm, Given):  # the mean and the bias are taken off as one number
        x_nd, shift_d = x_nd * 3, (sae.b_dec_d.double() + norm.mean_d.double() * norm.scale).abs()
    elif norm:
        x_nd = norm.apply(acts_nd).double()
    terms_n = ((x_nd.abs() + shift_d) * sae.w_enc_ds.double().abs().T).sum(dim=1) + sae.b_enc_s.double().abs()
    if isinstance(activation, Gated):
        terms_n = terms_n * activation.scale_s + activation.b_mag_s.abs()
    with Encoder(sae, CPU, "fp32", 1) as encoder:
        torch.testing.assert_close(encoder.magnitude(acts_nd, feature_n).double(), terms_n, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "activation", [Relu(), TopK(7), Gated(torch.linspace(0.5, 4, D_SAE), torch.full((D_SAE,), 50.0))], ids=str
)
def test_a_lift_adds_so_much_to_a_score(activation):
    """In the units of the score, before it is decided what a code keeps."""
    sae = make_sae(activation=activation)
    acts_bd = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(1))
    before_s = encode(sae, acts_bd)[0].tolist()
    with Encoder(sae, CPU, "fp32", 1) as encoder:
        for s, before in enumerate(before_s):
            after = encoder.encode_lifted(acts_bd, s, 100.0)
            assert math.isclose(after, before + 100, rel_tol=1e-5) if before else after > 0
            assert math.isclose(encoder.encode_lifted(acts_bd, s, 0.0) or 0.0, before, rel_tol=1e-5)


@pytest.mark.parametrize("product", [NumpyProduct, TorchProduct])
@pytest.mark.parametrize("activation", [*UNBOUNDED, GroupMax(5), Threshold(torch.linspace(0.1, 2, D_SAE))], ids=str)
def test_wanted_features_have_the_codes_that_they_have_among_all(activation, product, monkeypatch):
    """And not another bit whatever else is wanted: the ranks of a replay want different ones of an image."""
    made: list[slice] = []
    into = product.into
    monkeypatch.setattr(
        product, "into", lambda self, out_cb, part, *args: (made.append(part), into(self, out_cb, part, *args))[1]
    )
    monkeypatch.setattr(encoder, "uses_numpy", lambda *_, **__: product is NumpyProduct)
    monkeypatch.setattr(pieces, "WANTED_FEATURES", 16)
    sae, acts_bd = make_sae(activation=activation), torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1))
    all_bs = encode(sae, acts_bd)
    whole_blocks, columns = made.copy(), {}
    for wanted in ([3], [3, 17, 39], [20, 39], [*range(D_SAE)]):
        made.clear()
        found_bs, expected_bs = encode(sae, acts_bd, only=torch.tensor(wanted)), torch.zeros(50, D_SAE)
        expected_bs[:, wanted] = all_bs[:, wanted]
        torch.testing.assert_close(found_bs, expected_bs)
        assert all(torch.equal(found_bs[:, s], columns.setdefault(s, found_bs[:, s])) for s in wanted)
        near = [slice(first, min(first + 16, D_SAE)) for first in sorted({s // 16 * 16 for s in wanted})]
        assert made == (whole_blocks if isinstance(activation, TopK | GroupMax) else near)
