"""Job 1 on jobs drawn at random: whatever an SAE's rules and a job's sizes, every artifact equals its definition.

The definitions are written out once more here, in NumPy and float64. Where activations and weights are small integers every
product is exact, and so must the scores be, with ties. Else a score may be off by what float32 rounds, and a code that this
much decides may be there or not; all that is made of codes must still be exact, so it is compared with what the run's own
codes give.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from saev_dist import extract, job, verify
from saev_dist.config import Extract, Verify
from saev_dist.sae import plain
from saev_dist.sae.model import ConstantNorm, Gated, Given, GroupMax, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.store import Run
from tests.synthetic import make_shards

ROUNDING = 2.0**-18
"""By how much float32 may be off, of the sum of a score's terms."""
LAYERS = (9, 4, -2)
RULES = ["relu", "topk", "topk of positive", "threshold", "thresholds", "gated", "groupmax"]


@dataclass(frozen=True)
class Drawn:
    """A job: data, an SAE and settings."""

    is_exact: bool
    acts_epd: NDArray[np.float32]
    sae: Sae
    imgs_per_shard: int
    cls_token: bool
    n_threads: int
    settings: dict[str, object]


def draw_sae(draw, rules: str, is_exact: bool, size: float, d_model: int, d_sae: int, random: np.random.Generator) -> Sae:
    """An SAE for activations of about `size`, with two equal features."""

    def numbers(*shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = random.integers(-2, 3, shape) if is_exact else random.normal(size=shape) * scale
        return torch.from_numpy(drawn.astype(np.float32))

    given_scale = draw(st.sampled_from([1.0, -0.5, 2.0] if is_exact else [1.0, -0.37, 3.1]))
    norms = [None, Given(numbers(d_model, scale=size), given_scale)] + ([] if is_exact else [LayerNorm(), ConstantNorm()])
    input_norm = draw(st.sampled_from(norms))
    if isinstance(input_norm, LayerNorm | ConstantNorm):
        size = 1.0  # of what they make
    w_enc_ds, b_enc_s = numbers(d_model, d_sae, scale=d_model**-0.5), numbers(d_sae, scale=size / 4)
    b_enc_s -= draw(st.sampled_from([0, 1, 3])) * size  # many codes, some, few
    if d_sae > 1:
        w_enc_ds[:, 1], b_enc_s[1] = w_enc_ds[:, 0], b_enc_s[0]
    match rules:
        case "relu":
            activation = Relu()
        case "topk" | "topk of positive":
            activation = TopK(draw(st.integers(1, min(d_sae, 40))), relu=rules != "topk")
        case "threshold":
            activation = Threshold(draw(st.sampled_from([-1.0, 0.0, 0.5, 2.0])) * size)
        case "thresholds":
            activation = Threshold(numbers(d_sae, scale=size))
        case "gated":
            activation = Gated(torch.exp2(numbers(d_sae)), numbers(d_sae, scale=size))
        case "groupmax":
            activation = GroupMax(draw(st.sampled_from([n for n in range(1, d_sae + 1) if d_sae % n == 0])))
    return Sae(
        w_enc_ds=w_enc_ds,
        b_enc_s=b_enc_s,
        w_dec_sd=w_enc_ds.T.contiguous(),
        b_dec_d=numbers(d_model, scale=size / 4),
        activation=activation,
        pre_bias=draw(st.booleans()),
        input_norm=input_norm,
        source="drawn",
    )


@st.composite
def jobs(draw, rules: str) -> Drawn:
    is_exact = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    d_model, d_sae, n_patches = draw(st.integers(2, 90)), draw(st.integers(1, 300)), draw(st.integers(1, 80))
    n_imgs = draw(st.integers(1, max(1, 600 // n_patches)))
    shape, size = (n_imgs, n_patches, d_model), 1.0 if is_exact else 10.0 ** draw(st.integers(-3, 3))
    acts_epd = random.integers(-3, 4, shape) if is_exact else random.normal(size=shape) * size
    if draw(st.booleans()):
        acts_epd[random.random(shape[:2]) < 0.2] = 0  # tokens
    return Drawn(
        is_exact=is_exact,
        acts_epd=acts_epd.astype(np.float32),
        sae=draw_sae(draw, rules, is_exact, size, d_model, d_sae, random),
        imgs_per_shard=draw(st.integers(1, n_imgs)),
        cls_token=draw(st.booleans()),
        n_threads=draw(st.integers(1, 3)),
        settings={
            "top_k": draw(st.sampled_from([1, 3, 30, 300])),
            "rank_by": draw(st.sampled_from(["patch", "image"])),
            "percentile": draw(st.sampled_from([0.0, 12.5, 50.0, 99.0, 99.9, 100.0])),
            "screen": draw(st.sampled_from(["none", "bf16"])),
            "batch_tokens": draw(st.sampled_from([1, 10, 100, 1000])),
            "read_ahead": draw(st.integers(1, 4)),
            "snapshot_every": draw(st.sampled_from([0.0, 300.0])),
            "n_distributions": draw(st.integers(0, 400)) if is_exact else 400,
            "max_distribution_samples": draw(st.sampled_from([1, 50, 10**6])) if is_exact else 10**6,
        },
    )


def normalised(sae: Sae, x_bd: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What is multiplied by the encoder's weights, and the magnitudes of what it is made of."""
    match sae.input_norm:
        case None:
            x_bd, magnitude_bd = x_bd, np.abs(x_bd)
        case Given(mean_d, scale):
            magnitude_bd = (np.abs(x_bd) + np.abs(mean_d.numpy())) * abs(scale)
            x_bd = (x_bd - mean_d.numpy()) * scale
        case LayerNorm():
            x_bd = (x_bd - x_bd.mean(1, keepdims=True)) / (x_bd.std(1, ddof=1, keepdims=True) + 1e-5)
            magnitude_bd = np.abs(x_bd)
        case ConstantNorm():
            norm_b1 = np.linalg.norm(x_bd, axis=1, keepdims=True)
            x_bd = np.divide(x_bd, norm_b1 / math.sqrt(x_bd.shape[1]), out=np.zeros_like(x_bd), where=norm_b1 > 0)
            magnitude_bd = np.abs(x_bd)
    shift_d = sae.b_dec_d.numpy().astype(np.float64) * sae.pre_bias
    return x_bd - shift_d, magnitude_bd + np.abs(shift_d)


def codes_by_definition(sae: Sae, x_bd: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Of each token and feature (b, s): the code, by how much rounding may move it, and what it is if it is kept.

    The last is NaN where rounding cannot decide whether it is kept.
    """
    x_bd, magnitude_bd = normalised(sae, x_bd)
    w_ds, b_s = sae.w_enc_ds.numpy().astype(np.float64), sae.b_enc_s.numpy().astype(np.float64)
    h_bs = x_bd @ w_ds + b_s
    off_bs = (magnitude_bd @ np.abs(w_ds) + np.abs(b_s)) * ROUNDING
    score_bs, score_off_bs = h_bs, off_bs
    match sae.activation:
        case Relu():
            edge_bs = np.zeros_like(h_bs)
            kept_bs = h_bs > 0
        case Threshold(threshold):
            edge_bs = np.broadcast_to(np.maximum(np.float64(threshold), 0), h_bs.shape)
            kept_bs = h_bs > edge_bs
        case Gated(scale_s, b_mag_s):
            scale_s, b_mag_s = scale_s.numpy().astype(np.float64), b_mag_s.numpy().astype(np.float64)
            edge_bs = np.zeros_like(h_bs)
            kept_bs = h_bs > 0
            score_bs = np.maximum(scale_s * (h_bs - b_s) + b_mag_s, 0)
            score_off_bs = off_bs * scale_s + (np.abs(b_mag_s) + np.abs(scale_s * b_s)) * ROUNDING
        case TopK(k, relu):
            order_bs = np.argsort(-h_bs, axis=1, kind="stable")
            sorted_bs = np.append(np.take_along_axis(h_bs, order_bs, 1), np.full((len(h_bs), 1), -np.inf), 1)
            kept_bs = np.argsort(order_bs, axis=1) < k
            edge_bs = np.where(kept_bs, sorted_bs[:, k : k + 1], sorted_bs[:, k - 1 : k])  # whose place it has, or would take
            if relu:
                kept_bs &= h_bs > 0
        case GroupMax(k):
            groups_bkg = h_bs.reshape(len(h_bs), k, -1)
            is_first_bkg = np.arange(groups_bkg.shape[2]) == groups_bkg.argmax(2)[..., None]
            others_bk1 = np.where(is_first_bkg, -np.inf, groups_bkg).max(2, keepdims=True)
            edge_bs = np.where(is_first_bkg, others_bk1, groups_bkg.max(2, keepdims=True)).reshape(h_bs.shape)
            kept_bs = is_first_bkg.reshape(h_bs.shape) & (h_bs > 0)
    most_off_b1 = 2 * off_bs.max(1, keepdims=True)  # the edge may be another entry, which may be off as well
    undecided_bs = np.abs(h_bs - edge_bs) <= most_off_b1
    if isinstance(sae.activation, GroupMax) or (isinstance(sae.activation, TopK) and sae.activation.relu):
        undecided_bs = (undecided_bs | (np.abs(h_bs) <= most_off_b1)) & (h_bs > -most_off_b1)
    return np.where(kept_bs, score_bs, 0), score_off_bs, np.where(undecided_bs, score_bs, np.nan)


def slots_by_definition(codes_bs: NDArray, n_patches: int, top_k: int, rank_by: str) -> tuple[NDArray, NDArray, NDArray]:
    """Scores, images and patches of every feature's slots, by sorting all scores."""
    shape = (codes_bs.shape[1], top_k)
    values, imgs, patches = np.full(shape, -np.inf, np.float32), np.full(shape, -1), np.full(shape, -1)
    for feature, code_b in enumerate(codes_bs.T):
        order_b = np.lexsort((np.arange(len(code_b)), -code_b))
        token_n = order_b[code_b[order_b] > 0]
        if rank_by == "image":
            token_n = token_n[np.sort(np.unique(token_n // n_patches, return_index=True)[1])]
        token_n = token_n[:top_k]
        for slots, found_n in ((values, code_b[token_n]), (imgs, token_n // n_patches), (patches, token_n % n_patches)):
            slots[feature, : len(token_n)] = found_n
    return values, imgs, patches


def decoded_by_definition(sae: Sae, codes_bs: NDArray, x_bd: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the decoder makes of codes, in the activations' units."""
    y_bd = codes_bs.astype(np.float64) @ sae.w_dec_sd.numpy().astype(np.float64) + sae.b_dec_d.numpy()
    match sae.input_norm:
        case Given(mean_d, scale):
            return y_bd / scale + mean_d.numpy()
        case LayerNorm():
            return y_bd * x_bd.std(1, ddof=1, keepdims=True) + x_bd.mean(1, keepdims=True)
        case ConstantNorm():
            return y_bd * np.linalg.norm(x_bd, axis=1, keepdims=True) / math.sqrt(x_bd.shape[1])
    return y_bd


def check_artifacts(out: Path, drawn: Drawn, codes_bs: NDArray[np.float32]) -> None:
    """Everything but distributions.pt is what these codes, float32 (tokens, d_sae), give."""
    n_imgs, n_patches, _ = drawn.acts_epd.shape
    sae, settings = drawn.sae, drawn.settings

    def load(stem: str):
        return torch.load(out / f"{stem}.pt", weights_only=True)

    slots = slots_by_definition(codes_bs, n_patches, settings["top_k"], settings["rank_by"])
    for stem, expected, dtype in zip(
        ("top_values", "top_img_i", "top_patch_i"), slots, (torch.float32, torch.int64, torch.int64), strict=True
    ):
        assert load(stem).dtype == dtype
        np.testing.assert_array_equal(load(stem).numpy(), expected, stem)

    fires_s = (codes_bs > 0).sum(0)
    np.testing.assert_array_equal(load("sparsity").numpy(), (fires_s / len(codes_bs)).astype(np.float32))
    with np.errstate(invalid="ignore"):
        mean_s = np.maximum(codes_bs, 0).sum(0, dtype=np.float64) / fires_s
    np.testing.assert_allclose(load("mean_values").numpy(), mean_s, rtol=1e-6)
    histograms = load("histograms")
    assert histograms["n_tokens"] == len(codes_bs)
    for feature, code_b in enumerate(codes_bs.T):
        counts_h, _ = np.histogram(code_b[code_b > 0].astype(np.float64), histograms["edges"].double().numpy())
        np.testing.assert_array_equal(histograms["counts"][feature].numpy(), counts_h)
    percentile = settings["percentile"]
    true_s = np.percentile(np.maximum(codes_bs, 0), percentile, axis=0, method="inverted_cdf")
    in_range_s = (true_s >= 2.0**-16) & (true_s < 2.0**16)
    found_s = load(f"percentiles_p{percentile:g}").numpy()
    np.testing.assert_array_equal(found_s[true_s == 0], 0)
    np.testing.assert_allclose(found_s[in_range_s], true_s[in_range_s], rtol=1 / 31.9)

    img_acts = scipy.sparse.load_npz(out / "img_acts.npz")
    assert img_acts.dtype == np.float32 and img_acts.has_canonical_format
    strongest_eps = np.sort(codes_bs.reshape(n_imgs, n_patches, -1).astype(np.float64), 1)[:, -3:]
    rounding = 1e-6 * np.abs(strongest_eps).max()  # of three that nearly cancel
    np.testing.assert_allclose(img_acts.toarray(), strongest_eps.mean(1), rtol=1e-6, atol=rounding)

    x_bd = drawn.acts_epd.reshape(len(codes_bs), -1).astype(np.float64)
    metrics = json.loads((out / "metrics.json").read_bytes())
    assert metrics["n_tokens"] == len(codes_bs) and metrics["n_dead"] == (fires_s == 0).sum()
    assert metrics["l0"] == pytest.approx(fires_s.sum() / len(codes_bs))
    errors = np.square(x_bd - decoded_by_definition(sae, codes_bs, x_bd)).sum()
    baseline = np.square(x_bd - x_bd.mean(0)).sum()
    assert metrics["sse_recon"] == pytest.approx(errors, rel=1e-4, abs=1e-9 * np.square(x_bd).sum())
    assert metrics["sse_baseline"] == pytest.approx(baseline, rel=1e-6, abs=1e-9 * np.square(x_bd).sum())


@pytest.mark.parametrize("rules", RULES)
@given(st.data())
def test_every_artifact_equals_its_definition(rules, data):
    drawn = data.draw(jobs(rules))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        dpath = Path(folder)
        make_shards(
            dpath / "shards", drawn.acts_epd, imgs_per_shard=drawn.imgs_per_shard, layers=LAYERS, cls_token=drawn.cls_token
        )
        plain.save(dpath / "sae.safetensors", drawn.sae)
        patch.setattr(job, "batch_threads", lambda device: drawn.n_threads)
        out, of_run = dpath / "run", {"shards": dpath / "shards", "sae": dpath / "sae.safetensors"}
        extract.run(Extract(**of_run, out=out, layer=4, metrics=True, self_check="off", progress=False, **drawn.settings))
        assert {path.name for path in out.iterdir()} == {path.name for path in Run(out).artifacts()} | {"manifest.json"}

        x_bd = drawn.acts_epd.reshape(-1, drawn.sae.d_model).astype(np.float64)
        codes_bs, off_bs, if_kept_bs = codes_by_definition(drawn.sae, x_bd)
        found_bs = torch.load(out / "distributions.pt", weights_only=True).numpy().T
        if drawn.is_exact:
            codes_bs = codes_bs.astype(np.float32)
            stride = -(-len(codes_bs) // drawn.settings["max_distribution_samples"])
            np.testing.assert_array_equal(found_bs, codes_bs[::stride, : drawn.settings["n_distributions"]])
        else:
            is_right_bs = np.abs(found_bs - codes_bs) <= off_bs
            is_right_bs |= (np.abs(found_bs - if_kept_bs) <= off_bs) | (~np.isnan(if_kept_bs) & (found_bs == 0))
            assert is_right_bs.all(), np.argwhere(~is_right_bs)[:5]
            codes_bs = found_bs
        if isinstance(drawn.sae.activation, TopK):
            assert (codes_bs != 0).sum(1).max() <= drawn.sae.activation.k
        check_artifacts(out, drawn, codes_bs)
        if (codes_bs > 0).any():
            verify.run(Verify(run=out, all=True, progress=False))
