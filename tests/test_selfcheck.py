"""The self-check on the demo's photographs and SAE: it catches each misreading, and keeps quiet where there is none."""

import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from saev_dist import demo, selfcheck
from saev_dist.cli import main
from saev_dist.config import Demo
from saev_dist.data.images import list_images
from saev_dist.data.shards import Shards
from saev_dist.errors import CheckpointError, ConfigError, DataError
from saev_dist.sae.model import ConstantNorm, Given, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.sae.plain import save
from saev_dist.sae.saev import load_saev
from saev_dist.selfcheck import Figures, Report, check, examine, n_tokens
from tests.ranks import run_ranks
from tests.synthetic import make_shards

pytest.importorskip("skimage")

CPU = torch.device("cpu")
D = demo.D_MODEL
MEAN = 3 * torch.randn(D, generator=torch.Generator().manual_seed(7))
"""As activations of real models have one: larger than what varies."""


@dataclass(frozen=True)
class Trained:
    """The demo's activations, float32 (images, patches, d_model), and its SAE."""

    acts_epd: Tensor
    sae: Sae


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    dpath = tmp_path_factory.mktemp("selfcheck")
    demo.cut(demo.photographs_dpath(), dpath / "images")
    acts_epd = demo.embed(np.stack([np.asarray(Image.open(fpath)) for fpath in list_images(dpath / "images")]))
    demo.train(acts_epd.flatten(0, 1), dpath / "sae.pt", Demo(progress=False, n_steps=600))
    return Trained(acts_epd, load_saev(dpath / "sae.pt"))


def shifted(sae: Sae, *, pre_bias: bool) -> Sae:
    """The same SAE for activations that have MEAN added."""
    at_bdec = sae.b_dec_d @ sae.w_enc_ds if pre_bias else -MEAN @ sae.w_enc_ds
    return replace(sae, b_enc_s=sae.b_enc_s + at_bdec, b_dec_d=sae.b_dec_d + MEAN, pre_bias=pre_bias)


def rescaled(acts_epd: Tensor, *, shift: bool) -> Tensor:
    """Each token in a unit of its own, and with an offset of its own."""
    random = torch.Generator().manual_seed(3)
    size = torch.randn(*acts_epd.shape[:2], 1, generator=random).exp()
    return size * acts_epd + shift * 4 * torch.randn(*acts_epd.shape[:2], 1, generator=random)


def pairs(sae: Sae, threshold: float = 0.0) -> Sae:
    """Each axis once up and once down: of real activations a ReLU SAE without error, and with a threshold one with little."""
    axes = torch.cat([torch.eye(D), -torch.eye(D)])
    zeros = {"b_enc_s": torch.zeros(2 * D), "b_dec_d": torch.zeros(D)}
    activation = Threshold(threshold) if threshold else Relu()
    return replace(sae, w_enc_ds=axes.T.contiguous(), w_dec_sd=axes, activation=activation, **zeros)


def lifted(trained: Trained) -> tuple[Tensor, Sae]:
    """One more dimension that is the same for all tokens, and norms of sqrt(d): what a constant-norm SAE was trained on."""
    acts_epd, sae = trained.acts_epd, trained.sae
    size = math.sqrt((D + 1) / (2 * D))
    sae = replace(
        sae,
        w_enc_ds=torch.cat([sae.w_enc_ds / size, torch.zeros(1, sae.d_sae)]),
        w_dec_sd=torch.cat([sae.w_dec_sd * size, torch.zeros(sae.d_sae, 1)], dim=1),
        b_dec_d=torch.cat([sae.b_dec_d, torch.tensor([math.sqrt(D)])]) * size,
        input_norm=ConstantNorm(),
    )
    return torch.cat([acts_epd, torch.full((*acts_epd.shape[:2], 1), math.sqrt(D))], dim=2) * size, sae


# What the activations are, the SAE as it should be read, and as it is read; the flag that the finding must name.
Case = Callable[[Trained], tuple[Tensor, Sae, Sae]]


def b_dec_left_in(t: Trained) -> tuple[Tensor, Sae, Sae]:
    sae = shifted(t.sae, pre_bias=True)
    return t.acts_epd + MEAN, sae, replace(sae, pre_bias=False)


def b_dec_subtracted_twice(t: Trained) -> tuple[Tensor, Sae, Sae]:
    sae = shifted(t.sae, pre_bias=False)
    return t.acts_epd + MEAN, sae, replace(sae, pre_bias=True)


def top_k_as_relu(t: Trained) -> tuple[Tensor, Sae, Sae]:
    return t.acts_epd, t.sae, replace(t.sae, activation=Relu())


def threshold_dropped(t: Trained) -> tuple[Tensor, Sae, Sae]:
    return t.acts_epd, t.sae, replace(t.sae, activation=Threshold(0.0))


def relu_as_top_k(t: Trained) -> tuple[Tensor, Sae, Sae]:
    return t.acts_epd, pairs(t.sae), replace(pairs(t.sae), activation=TopK(8))


def threshold_too_high(t: Trained) -> tuple[Tensor, Sae, Sae]:
    return t.acts_epd, pairs(t.sae, 0.3), pairs(t.sae, 9.0)


def layer_norm_left_out(t: Trained) -> tuple[Tensor, Sae, Sae]:
    return rescaled(t.acts_epd, shift=True), replace(t.sae, input_norm=LayerNorm()), t.sae


def constant_norm_left_out(t: Trained) -> tuple[Tensor, Sae, Sae]:
    acts_epd, sae = lifted(t)
    return rescaled(acts_epd, shift=False), sae, replace(sae, input_norm=None)


def layer_norm_too_much(t: Trained) -> tuple[Tensor, Sae, Sae]:
    sae = shifted(t.sae, pre_bias=False)
    return t.acts_epd + MEAN, sae, replace(sae, input_norm=LayerNorm())


def scale_left_out(t: Trained) -> tuple[Tensor, Sae, Sae]:
    sae = pairs(t.sae, 0.3)
    return t.acts_epd / 50, replace(sae, input_norm=Given(torch.zeros(D), 50.0)), sae


def mean_and_scale_left_out(t: Trained) -> tuple[Tensor, Sae, Sae]:
    sae = pairs(t.sae, 0.3)
    return t.acts_epd / 50 + MEAN, replace(sae, input_norm=Given(MEAN, 50.0)), sae


def scaled_twice(t: Trained) -> tuple[Tensor, Sae, Sae]:
    sae = pairs(t.sae, 0.3)
    return t.acts_epd, sae, replace(sae, input_norm=Given(torch.zeros(D), 0.02))


MISREAD: dict[Case, str] = {
    b_dec_left_in: "use --pre-bias.",
    b_dec_subtracted_twice: "use --no-pre-bias.",
    top_k_as_relu: "use --activation topk:K with the K of training, about 4.",
    threshold_dropped: "use the --threshold of training, or --activation topk:K with the K of training, about 4.",
    relu_as_top_k: "use --activation relu.",
    threshold_too_high: "use --activation relu.",
    layer_norm_left_out: "use --input-norm layer_norm.",
    constant_norm_left_out: "use --input-norm constant_norm_rescale.",
    layer_norm_too_much: "use --input-norm none.",
    scale_left_out: "use --input-scale 6",
    mean_and_scale_left_out: "use --input-mean FILE --input-scale 6",
    scaled_twice: "use --input-norm none, and neither --input-mean nor --input-scale.",
}


def examined(tmp_path: Path, acts_epd: Tensor, sae: Sae) -> Report:
    shards = make_shards(tmp_path / "shards", acts_epd.numpy(), imgs_per_shard=100)
    return examine(sae, Shards.open(shards), CPU)


@pytest.mark.parametrize("case", MISREAD)
def test_a_misreading_is_caught_and_the_flag_named(tmp_path, trained, case):
    acts_epd, _, wrong = case(trained)
    report = examined(tmp_path, acts_epd, wrong)
    assert report.finding is not None and MISREAD[case] in report.finding, str(report)


@pytest.mark.parametrize("case", MISREAD)
def test_the_right_reading_is_left_in_peace(tmp_path, trained, case):
    acts_epd, right, _ = case(trained)
    report = examined(tmp_path, acts_epd, right)
    assert report.finding is None, str(report)
    assert report.figures[0].normalized_mse < 0.6


def test_an_sae_of_other_activations_is_told_from_a_misread_one(tmp_path, trained):
    order = torch.randperm(demo.D_SAE, generator=torch.Generator().manual_seed(1))
    report = examined(tmp_path, trained.acts_epd[:60], replace(trained.sae, w_dec_sd=trained.sae.w_dec_sd[order]))
    assert "Is it the SAE of this model and layer" in report.finding


@pytest.mark.parametrize("k", [demo.TOP_K, 300])  # more than are above zero
def test_figures_are_those_of_their_definition(tmp_path, trained, k):
    acts_epd = trained.acts_epd[:28]  # 4,032 tokens: all of them are looked at
    report = examined(tmp_path, acts_epd, replace(trained.sae, activation=TopK(k)))
    x = acts_epd.flatten(0, 1)
    value, feature = (x @ trained.sae.w_enc_ds + trained.sae.b_enc_s).topk(k, dim=1)
    codes = torch.zeros(len(x), demo.D_SAE).scatter(1, feature, value)
    error = (codes @ trained.sae.w_dec_sd + trained.sae.b_dec_d - x).square().sum() / (x - x.mean(0)).square().sum()
    own = report.figures[0]
    assert report.n_tokens == len(x)
    assert own.normalized_mse == pytest.approx(float(error), rel=1e-3)
    assert k == demo.TOP_K or (codes < 0).any()
    assert own.l0 == pytest.approx(float((codes > 0).sum(1).float().mean()), abs=1e-3)
    assert own.dead_share == pytest.approx(float((codes <= 0).all(0).float().mean()), abs=0.005)


def test_a_large_sae_is_tried_on_fewer_tokens(tmp_path, trained, monkeypatch):
    assert n_tokens(trained.sae) == 4096
    assert n_tokens(replace(trained.sae, w_enc_ds=torch.zeros(1).expand(4096, 2**20))) == 512
    assert n_tokens(replace(trained.sae, w_enc_ds=torch.zeros(1).expand(8, 2**17))) == 2048
    monkeypatch.setattr(selfcheck, "MAX_PRODUCTS", 1000 * trained.sae.w_enc_ds.numel())
    report = examined(tmp_path, trained.acts_epd, replace(trained.sae, activation=Relu()))
    assert 900 < report.n_tokens < 1100 and "use --activation topk:K" in report.finding


@pytest.mark.parametrize(
    ("activation", "n_threads", "sizes"),
    [(TopK(4), 1, [8, 64, 64, 125, 39]), (TopK(4), 2, [8, 64, 64, 64, 50, 25, 13, 8, 4]), (Relu(), 1, [8] * 37 + [4])],
    ids=["few", "few for two", "many"],
)
def test_tokens_are_encoded_at_a_time_by_how_many_codes_they_have(trained, monkeypatch, activation, n_threads, sizes):
    """A piece of a large SAE is all overhead where it holds few tokens, and all memory where they fire everywhere."""
    taken, submit = [], selfcheck.Encoder.submit_batch

    def note(encoder, acts_bd, **kwargs):
        taken.append(len(acts_bd))
        return submit(encoder, acts_bd, **kwargs)

    monkeypatch.setattr(selfcheck, "CHUNK_CODES", 1000)
    monkeypatch.setattr(selfcheck.Encoder, "submit_batch", note)
    x_bd = trained.acts_epd.flatten(0, 1)[:300]
    with selfcheck.Encoder(replace(trained.sae, activation=activation), CPU, "fp32", n_threads) as encoder:
        codes = list(selfcheck._encoded(encoder, x_bd))
    assert taken == sizes
    assert sum(part.n_imgs for part in codes) == 300 and torch.equal(torch.cat([part.acts_bd for part in codes]), x_bd)


def test_the_first_tokens_are_of_many_images(tmp_path):
    """They tell how many codes the others may have."""
    acts_epd = torch.arange(64.0)[:, None, None].expand(64, 9, 5)
    x_bd = selfcheck._sample(Shards.open(make_shards(tmp_path / "shards", acts_epd.numpy())), 576, skip_bad=False)
    assert len(x_bd[:8, 0].unique()) > 4 and torch.equal(x_bd[:, 0].sort().values, acts_epd[:, :, 0].flatten())


def test_equal_activations_and_overflow_give_no_finding(tmp_path, trained):
    report = examined(tmp_path / "equal", torch.ones(3, 4, D), trained.sae)
    assert report.finding is None and report.figures[0].normalized_mse is None
    assert "none: nothing can be told from activations that are all equal" in str(report)
    assert "L0" not in str(report)
    report = examined(tmp_path / "large", torch.full((3, 4, D), 1e38), trained.sae)
    assert report.finding is None and report.figures[0].normalized_mse is None


def test_bad_shards_are_passed_over_where_the_run_does_so(tmp_path, trained):
    acts_epd = trained.acts_epd[:40].clone()
    acts_epd[30:] = torch.nan
    dpath = make_shards(tmp_path / "shards", acts_epd.numpy(), imgs_per_shard=10)
    shards = Shards.open(dpath)
    with pytest.raises(DataError, match="image 30"):
        check(trained.sae, shards, CPU, "warn")
    assert check(trained.sae, shards, CPU, "warn", skip_bad=True).n_tokens < 40 * shards.n_patches
    for fpath in dpath.glob("acts*"):
        fpath.unlink()
    assert check(trained.sae, shards, CPU, "strict", skip_bad=True).figures == []


def test_a_reading_that_overflows_where_another_does_not_is_a_finding(tmp_path, trained):
    """A scale that training never had, so large that no error can be added up."""
    report = examined(tmp_path, trained.acts_epd[:40], replace(trained.sae, input_norm=Given(torch.zeros(D), 1e-30)))
    assert report.figures[0].normalized_mse is None
    assert "as it is read gives normalized MSE not computable; not scaled: normalized MSE 0." in report.finding
    noise_epd = 100 * torch.randn(40, 4, D, generator=torch.Generator().manual_seed(1)) + 300
    report = examined(tmp_path / "noise", noise_epd, replace(trained.sae, input_norm=Given(torch.zeros(D), 1e-30)))
    assert "not computable, and none of the readings that were tried does clearly better than the mean" in report.finding
    assert "none: " not in str(report)


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "cpu"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "the host"),
        (MemoryError(), "the host"),
    ],
)
def test_memory_too_small_for_it_is_said(tmp_path, trained, monkeypatch, capsys, error, where):
    full = Future()
    full.set_exception(error)
    shards = Shards.open(make_shards(tmp_path / "shards", trained.acts_epd[:4].numpy()))
    monkeypatch.setattr(selfcheck.Encoder, "submit_batch", lambda *_, **__: [full])
    assert check(trained.sae, shards, CPU, "warn") is None
    assert f"warning: the self-check needs more memory than {where} has" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"needs more memory than {where} has"):
        check(trained.sae, shards, CPU, "strict")


def test_modes(tmp_path, trained, capsys, monkeypatch):
    acts_epd, _, wrong = top_k_as_relu(trained)
    shards = Shards.open(make_shards(tmp_path / "shards", acts_epd[:40].numpy(), imgs_per_shard=9))
    assert check(wrong, shards, CPU, "off") is None
    assert check(replace(wrong, reconstructs=False), shards, CPU, "strict") is None
    assert capsys.readouterr() == ("", "")
    report = check(wrong, shards, CPU, "warn")
    assert capsys.readouterr() == ("", f"saev-dist: warning: {report.finding}\n")
    monkeypatch.setattr(selfcheck, "LONG", 4096 * wrong.d_sae)
    check(wrong, shards, CPU, "warn")
    assert (
        capsys.readouterr().out
        == "self-check: about 4,096 tokens under each reading of the SAE (--self-check off leaves it out)\n"
    )
    with pytest.raises(CheckpointError, match="--self-check warn goes on"):
        check(wrong, shards, CPU, "strict")


def test_strict_stops_every_rank_before_the_stream_and_warn_goes_on(tmp_path, trained):
    shards = make_shards(tmp_path / "shards", trained.acts_epd[:40].numpy(), imgs_per_shard=9)
    save(tmp_path / "sae.safetensors", replace(trained.sae, activation=Relu()))
    args = ["extract", "--shards", shards, "--sae", tmp_path / "sae.safetensors", "--out", tmp_path / "run", "--no-progress"]
    done = run_ranks(*args, "--self-check", "strict", n_ranks=2)
    assert done.returncode == 1
    shown = [line for line in done.stderr.splitlines() if "saev-dist: error: " in line]
    assert len(shown) == 1 and "top 4: normalized MSE" in shown[0], done.stderr
    assert not (tmp_path / "run").exists()
    done = run_ranks(*args, n_ranks=2)
    assert done.returncode == 0 and done.stderr.count("saev-dist: warning: ") == 1, done.stderr
    report = json.loads((tmp_path / "run/manifest.json").read_text())["self_check"]
    assert "--activation topk:K" in report["finding"]
    assert [figures["reading"] for figures in report["figures"]][:3] == ["as it is read", "b_dec subtracted", "top 4"]


NAN = {"reading": "x", "flags": "", "normalized_mse": math.nan, "l0": 1.0, "dead_share": 0.0}


@pytest.mark.parametrize(
    "change",
    [{"finding": 7}, {"n_tokens": "9"}, {"figures": None}, {"figures": [{"reading": "x"}]}, {"figures": [NAN]}],
    ids=str,
)
def test_a_report_goes_through_json_and_one_of_another_make_counts_for_nothing(change):
    own = Figures(reading="as it is read", flags="", normalized_mse=None, l0=3.0, dead_share=0.5)
    report = Report(n_tokens=9, figures=[own, replace(own, normalized_mse=0.25)], finding=None)
    obj = json.loads(json.dumps(report.to_json()))
    assert Report.from_json(obj) == report and Report.from_json(obj | {"finding": "x"}) == replace(report, finding="x")
    assert Report.from_json(obj | change) is None and Report.from_json(None) is None


def test_inspect_shows_the_figures_alone(tmp_path, trained, capsys):
    shards = make_shards(tmp_path / "shards", trained.acts_epd[:40].numpy(), layers=(3, 4), layer=4)
    sae = tmp_path / "sae.safetensors"
    save(sae, trained.sae)
    main(["inspect", str(sae), "--shards", str(shards), "--layer", "4"])
    text = capsys.readouterr().out
    assert "ReLU, not top-k" in text and "none: the SAE gives the activations back best as it is read" in text
    main(["inspect", str(sae), "--shards", str(shards), "--layer", "4", "--activation", "relu"])
    assert "use --activation topk:K" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_activations_of_width_one_are_looked_at_without_a_word_of_torch(tmp_path, capfd):
    random = torch.Generator().manual_seed(0)
    shards = make_shards(tmp_path / "shards", torch.randn(6, 3, 1, generator=random).numpy())
    w_ds = torch.ones(1, 4)
    sae = Sae(
        w_enc_ds=w_ds,
        b_enc_s=torch.zeros(4),
        w_dec_sd=w_ds.T.contiguous(),
        b_dec_d=torch.zeros(1),
        activation=Relu(),
        pre_bias=False,
        source="t",
    )
    report = examine(sae, Shards.open(shards), torch.device("cpu"))
    assert "layer norm" not in {figures.reading for figures in report.figures} and "constant norm" in str(report)
    assert capfd.readouterr().err == ""
