"""Every format is encoded as its own program did."""

import io
import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from saev_dist.config import Extract, SaeRules
from saev_dist.errors import CheckpointError, ConfigError
from saev_dist.sae import plain
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.load import FORMATS, Overrides, load_sae, recognise
from saev_dist.sae.model import Gated, Given, GroupMax, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.sae.saev import save_saev
from saev_dist.sae.safetensors import write_safetensors
from tests.sae_files import CPU, DATA, edit, edit_tensors, encode, expected, load, same_features
from tests.synthetic import BATCH_TOPK, RELU, make_sae

NAMES = sorted(str(fpath.parent.relative_to(DATA)) for fpath in DATA.glob("*/*/expected.safetensors"))


# The formats as their programs wrote them.


def test_all_fixtures_are_here():
    assert len(NAMES) == 32


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_original_program(name):
    x_bd, feats_bs = expected(name)
    assert recognise(DATA / name) == name.split("/")[0]
    same_features(encode(load(DATA / name), x_bd), feats_bs)


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_sae_is_the_same_sae(tmp_path, name):
    x_bd, _ = expected(name)
    sae = load(DATA / name)
    plain.save(tmp_path / "sae.safetensors", sae)
    again = load(tmp_path / "sae.safetensors")
    assert again.rules() == sae.rules() and again.source == sae.source and again.relu_of_top_k == sae.relu_of_top_k
    assert torch.equal(encode(again, x_bd), encode(sae, x_bd))
    assert all(torch.equal(a, b) for a, b in zip(again.decoder(), sae.decoder(), strict=True))


def test_each_format_can_be_asked_for():
    assert set(get_args(get_type_hints(SaeRules)["sae_format"])) == {"auto", *FORMATS}


# README's matrix, cell by cell.

FIXTURE_OF = {
    ("saev", "Relu"): "../saev-1.1/relu/sae.pt",
    ("saev", "TopK"): "../saev-1.1/topk/sae.pt",
    ("saev", "BatchTopK"): "../saev-2.1/btopk/sae.pt",
    ("sae_lens", "standard"): "sae_lens/standard_{norm}_pre",
    ("sae_lens", "jumprelu"): "sae_lens/jumprelu_{norm}_pre",
    ("sae_lens", "topk"): "sae_lens/topk_{norm}_pre",
    ("sae_lens", "topk, rescaled by decoder norm"): "sae_lens/topk_rescale_{norm}",
    ("sae_lens", "gated"): "sae_lens/gated_{norm}_pre",
    ("sae_lens", "batchtopk, during training"): "sae_lens/batchtopk_training_{norm}",
    ("sparsify", "topk"): "sparsify/topk",
    ("sparsify", "groupmax"): "sparsify/groupmax",
    ("dictionary_learning", "AutoEncoder"): "dictionary_learning/standard",
    ("dictionary_learning", "AutoEncoderNew"): "dictionary_learning/standard_new",
    ("dictionary_learning", "AutoEncoderTopK"): "dictionary_learning/top_k",
    ("dictionary_learning", "BatchTopKSAE"): "dictionary_learning/batch_top_k",
    ("dictionary_learning", "JumpReluAutoEncoder"): "dictionary_learning/jumprelu",
    ("dictionary_learning", "GatedAutoEncoder"): "dictionary_learning/gated",
}
README = (Path(__file__).parent.parent / "README.md").read_text()
NORMS = {
    "none": lambda x: x,
    "layer_norm": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5),
    "constant_norm_rescale": lambda x: x * x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True),
    "given": lambda x: (x - 0.5) * 0.75,
}


def matrix() -> dict[tuple[str, str, str], str]:
    """Format, architecture and normalisation of each cell, and what it says."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]
    cells = {}
    for row in rows:
        if len(row) == 6 and (row[0], row[1]) in FIXTURE_OF:
            cells |= {(row[0], row[1], norm): cell for norm, cell in zip(NORMS, row[2:], strict=True)}
    return cells


MATRIX = matrix()


def test_the_matrix_has_a_row_for_each_architecture():
    assert len(MATRIX) == 4 * len(FIXTURE_OF) and set(MATRIX.values()) == {"file", "flag"}


@pytest.mark.parametrize("cell", MATRIX, ids=" ".join)
def test_a_cell_of_the_matrix_holds(cell):
    sae_format, architecture, norm = cell
    source = FIXTURE_OF[sae_format, architecture]
    if MATRIX[cell] == "file":
        path = DATA / source.format(norm=norm)
        sae = load(path)
        assert (sae.input_norm.name if sae.input_norm else "none") == norm
        if sae_format == "saev":  # test_extract compares their features with saev's, or BatchTopK's with its definition
            assert architecture in sae.source
        else:
            x_bd, feats_bs = expected(source.format(norm=norm))
            same_features(encode(sae, x_bd), feats_bs)
        return
    path = DATA / source.format(norm="none")
    said = {"input_norm": norm}
    plain_sae = load(path)
    if norm == "given":
        said = {"input_mean": np.full(plain_sae.d_model, 0.5, "<f4").tobytes(), "input_scale": 0.75}
    x_bd = 2 * torch.randn(64, plain_sae.d_model, generator=torch.Generator().manual_seed(0)) + 0.5
    found, wanted = encode(load(path, **said), x_bd), encode(plain_sae, NORMS[norm](x_bd))
    assert wanted.any() and not torch.equal(found, encode(plain_sae, x_bd))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# What the fixtures do not hold.


def test_top_k_of_sae_lens_before_version_6(copy_sae):
    dpath = copy_sae("sae_lens/topk_none_pre")
    x_bd, feats_bs = expected("sae_lens/topk_none_pre")
    for name in ("activation_fn", "activation_fn_str"):
        edit(dpath / "cfg.json", architecture="standard", k=None, **{name: "topk", "activation_fn_kwargs": {"k": 6}})
        same_features(encode(load(dpath), x_bd), feats_bs)
        edit(dpath / "cfg.json", k=6, **{name: None})


def test_a_fine_tuned_sae_scales_its_decoder_only(copy_sae):
    dpath = copy_sae("sae_lens/standard_none_pre")
    x_bd, feats_bs = expected("sae_lens/standard_none_pre")
    weights = dpath / "sae_weights.safetensors"
    before = load(dpath).w_dec_sd
    edit_tensors(weights, scaling_factor=torch.ones(96))  # written whether or not there was fine-tuning
    assert torch.equal(load(dpath).w_dec_sd, before)
    edit_tensors(weights, scaling_factor=torch.full((96,), 2.0))
    with pytest.raises(CheckpointError, match="says that there is none"):
        load(dpath)
    edit(dpath / "cfg.json", finetuning_scaling_factor=True)
    same_features(encode(load(dpath), x_bd), feats_bs)
    assert torch.equal(load(dpath).w_dec_sd, 2 * before)


@pytest.mark.parametrize("value", [True, "expected_average_only_in"])
def test_an_average_scale_must_be_given(copy_sae, value):
    dpath = copy_sae("sae_lens/standard_none_pre")
    x_bd, feats_bs = expected("sae_lens/standard_none_pre")
    edit(dpath / "cfg.json", normalize_activations=value)
    with pytest.raises(ConfigError, match="give it with --input-scale"):
        load(dpath)
    same_features(encode(load(dpath, input_scale=0.25), 4 * x_bd), feats_bs)
    same_features(encode(load(dpath, input_norm="none"), x_bd), feats_bs)  # as the self-check may advise


def test_the_scale_beside_a_checkpoint_of_training_is_read(copy_sae):
    dpath = copy_sae("sae_lens/standard_none_pre")
    x_bd, feats_bs = expected("sae_lens/standard_none_pre")
    edit(dpath / "cfg.json", normalize_activations="expected_average_only_in")
    (dpath / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    sae = load(dpath)
    same_features(encode(sae, 4 * x_bd), feats_bs)
    assert sae.rules()["input_scale"] == 0.25
    same_features(encode(load(dpath, input_scale=0.5), 2 * x_bd), feats_bs)  # a flag has the last word
    mean = np.full(20, 3, "<f4").tobytes()
    same_features(encode(load(dpath, input_mean=mean), 4 * x_bd + 3), feats_bs, atol=1e-5)
    (dpath / "activation_scaler.json").write_text('{"scaling_factor": null}')
    with pytest.raises(ConfigError, match="give it with --input-scale"):
        load(dpath)
    for text, why in {
        '{"scaling_factor": 0}': "should be above zero",
        '{"scaling_factor": Infinity}': "should be above zero",
        '{"scaling_factor": "1"}': "should be a number",
        '{"scaling_factor": 1, "mean": 2}': "fields that this version does not know",
        '{"scaling_factor": 1, "has_whitening": true}': "has_whitening is true; this version reads checkpoints without it",
    }.items():
        (dpath / "activation_scaler.json").write_text(text)
        with pytest.raises(CheckpointError, match=why):
            load(dpath)
    edit(dpath / "cfg.json", normalize_activations="none")  # folded: nobody asks for it
    same_features(encode(load(dpath), x_bd), feats_bs)


def test_the_earliest_batch_topk_of_dictionary_learning_has_no_threshold(copy_sae):
    dpath = copy_sae("dictionary_learning/batch_top_k")
    x_bd, feats_bs = expected("dictionary_learning/batch_top_k")
    state = torch.load(dpath / "ae.pt", weights_only=True)
    threshold = float(state["threshold"])
    edit_tensors(dpath / "ae.pt", threshold=None, k=None)
    k = json.loads((dpath / "config.json").read_text())["trainer"]["k"]
    with pytest.raises(ConfigError, match=rf"BatchTopKSAE of K {k}\) holds no threshold"):
        load(dpath)
    same_features(encode(load(dpath, threshold=threshold), x_bd), feats_bs)
    assert load(dpath, activation=f"topk:{k}").activation == TopK(k, relu=True)


@pytest.mark.parametrize(
    ("path", "relu"),
    [
        ("sae_lens/standard_none_pre", True),
        ("dictionary_learning/standard", True),
        ("../saev-1.1/relu/sae.pt", False),
        ("../saev-1.1/topk/sae.pt", False),
        ("sae_lens/topk_none_pre", True),
    ],
)
def test_a_top_k_that_is_asked_for_is_that_of_its_program(tmp_path, path, relu):
    assert load(DATA / path, activation="topk:3").activation == TopK(3, relu=relu)
    plain.save(tmp_path / "sae.safetensors", load(DATA / path))
    assert load(tmp_path / "sae.safetensors", activation="topk:3").activation == TopK(3, relu=relu)


def test_scores_of_an_autoencoder_are_those_of_its_stored_weights():
    """As `encode` gives them: `load_dictionary` would multiply each by its column's norm, here about 0.1."""
    x_bd, feats_bs = expected("dictionary_learning/standard")
    sae = load(DATA / "dictionary_learning/standard")
    found_bs, norm_s = encode(sae, x_bd), sae.w_dec_sd.norm(dim=1)
    same_features(found_bs, feats_bs)
    assert not torch.allclose(found_bs, feats_bs * norm_s, rtol=0.5)


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_a_training_backup_is_scaled_by_its_norm_factor(copy_sae, name):
    """Trained on x / factor, whose features are the program's; scaled, it takes x and gives factor times those."""
    folder = {
        "AutoEncoder": "standard",
        "AutoEncoderTopK": "top_k",
        "BatchTopKSAE": "batch_top_k",
        "GatedAutoEncoder": "gated",
        "JumpReluAutoEncoder": "jumprelu",
    }[name]
    dpath = copy_sae(f"dictionary_learning/{folder}")
    x_bd, feats_bs = expected(f"dictionary_learning/{folder}")
    state = torch.load(dpath / "ae.pt", weights_only=True)
    backup = {"step": 7, "ae": state, "optimizer": {"state": {}}, "config": {"lr": 1e-3}, "norm_factor": 3.5}
    torch.save(backup, dpath / "ae.pt")
    same_features(encode(load(dpath), 3.5 * x_bd) / 3.5, feats_bs)
    for factor in (None, 0.0, float("nan"), "3", torch.ones(2), torch.ones(1, device="meta")):
        torch.save(backup | {"norm_factor": factor}, dpath / "ae.pt")
        with pytest.raises(CheckpointError, match="cannot be scaled"):
            load(dpath)
    torch.save(backup | {"ema": 1}, dpath / "ae.pt")
    with pytest.raises(CheckpointError, match=r"unknown members \(ema\)"):
        load(dpath)


def test_matryoshka_stores_its_weights_the_other_way_round(copy_sae):
    dpath = copy_sae("dictionary_learning/batch_top_k")
    x_bd, feats_bs = expected("dictionary_learning/batch_top_k")
    state = torch.load(dpath / "ae.pt", weights_only=True)
    state |= {
        "W_enc": state.pop("encoder.weight").T,
        "b_enc": state.pop("encoder.bias"),
        "W_dec": state.pop("decoder.weight").T,
    }
    torch.save(state | {"group_sizes": torch.tensor([32, 64])}, dpath / "ae.pt")
    edit(dpath / "config.json", dict_class="MatryoshkaBatchTopKSAE", group_sizes=[32, 64])
    same_features(encode(load(dpath), x_bd), feats_bs)


def test_a_transcoder_reads_its_input_as_it_is(copy_sae):
    dpath = copy_sae("sparsify/topk")
    x_bd, feats_bs = expected("sparsify/topk")
    edit(dpath / "cfg.json", transcode=True, skip_connection=True)
    weights = dpath / "sae.safetensors"
    with pytest.raises(CheckpointError, match="no tensor W_skip"):
        load(dpath)
    edit_tensors(weights, W_skip=torch.zeros(20, 20))
    sae = load(dpath)
    assert not sae.reconstructs
    same_features(encode(sae, x_bd - sae.b_dec_d), feats_bs)


def test_sparsify_of_before_2025_says_that_it_does_not_rank_by_magnitude(copy_sae):
    dpath = copy_sae("sparsify/topk")
    x_bd, feats_bs = expected("sparsify/topk")
    edit(dpath / "cfg.json", signed=False)
    same_features(encode(load(dpath), x_bd), feats_bs)
    edit(dpath / "cfg.json", signed=True)
    with pytest.raises(CheckpointError, match="signed is true; this version reads SAEs without it"):
        load(dpath)


def test_weights_that_do_not_fit_into_memory_are_not_called_damaged(copy_sae, monkeypatch):
    dpath = copy_sae("dictionary_learning/top_k")

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(CheckpointError, match="GB of weights do not fit into memory; free some"):
        load(dpath)


def test_latents_of_sparsify_may_be_a_multiple_of_the_width(copy_sae):
    dpath = copy_sae("sparsify/topk")
    edit(dpath / "cfg.json", num_latents=0)
    with pytest.raises(CheckpointError, match=r"promise floats \(640, 20\)"):
        load(dpath)


def test_equal_values_go_to_the_lower_feature():
    w_ds = torch.tensor([[1.0, 1.0, 0.5, 1.0, 1.0, -1.0]])
    rest = {"w_enc_ds": w_ds, "b_enc_s": torch.zeros(6), "w_dec_sd": w_ds.T, "b_dec_d": torch.zeros(1), "pre_bias": False}
    x_bd = torch.tensor([[2.0], [-2.0], [0.0]])
    found = encode(Sae(**rest, activation=GroupMax(2), source=""), x_bd)
    assert found.tolist() == [[2, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 2], [0] * 6]
    found = encode(Sae(**rest, activation=TopK(3, relu=True), source=""), x_bd)
    assert found.tolist() == [[2, 2, 0, 2, 0, 0], [0, 0, 0, 0, 0, 2], [0] * 6]


# What a file cannot say.


def test_a_mean_and_a_scale_are_applied_first(tmp_path):
    x_bd, feats_bs = expected("sae_lens/standard_none_pre")
    mean_d = torch.linspace(-3, 5, 20)
    torch.save(mean_d, tmp_path / "mean.pt")
    mean_d.numpy().dump(tmp_path / "pickle.npy")
    np.save(tmp_path / "mean.npy", mean_d.double().numpy())
    write_safetensors(tmp_path / "mean.safetensors", {"any": mean_d}, {})
    for suffix in (".pt", ".npy", ".safetensors"):
        flags = Extract(shards=Path(), sae=Path(), out=Path(), input_mean=tmp_path / f"mean{suffix}", input_scale=2.0)
        overrides = Overrides.of(flags)
        sae = load_sae(DATA / "sae_lens/standard_none_pre", overrides).sae
        same_features(encode(sae, x_bd / 2 + mean_d), feats_bs, atol=1e-5)  # the mean costs bits of x
        w_sd, b_d = sae.decoder()
        torch.testing.assert_close(
            feats_bs @ w_sd + b_d, (feats_bs @ sae.w_dec_sd + sae.b_dec_d) / 2 + mean_d, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(CheckpointError, match="more than tensors"):
        Overrides.of(Extract(shards=Path(), sae=Path(), out=Path(), input_mean=tmp_path / "pickle.npy"))
    write_safetensors(tmp_path / "two.safetensors", {"mean": mean_d, "scale": mean_d}, {})
    with pytest.raises(ConfigError, match="holds 2 tensors; --input-mean takes a file with one vector"):
        Overrides.of(Extract(shards=Path(), sae=Path(), out=Path(), input_mean=tmp_path / "two.safetensors"))
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.ones(20, complex))
    for name, header in {
        "larger": "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }",
        "no": "{'descr': ((((",
    }.items():
        (tmp_path / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode() + b"\n")
    for name in ("objects", "complex", "larger", "no"):
        with pytest.raises(ConfigError, match="takes a file with one vector"):
            Overrides.of(Extract(shards=Path(), sae=Path(), out=Path(), input_mean=tmp_path / f"{name}.npy"))


def test_a_threshold_can_be_given_where_the_file_lacks_it(tmp_path):
    fpath = make_sae(tmp_path / "sae.pt", BATCH_TOPK)
    line, body = fpath.read_bytes().split(b"\n", 1)
    state = torch.load(io.BytesIO(body), weights_only=True)
    del state["activation.threshold"]
    with open(fpath, "wb") as file:
        file.write(line + b"\n")
        torch.save(state, file)
    with pytest.raises(ConfigError, match="holds no threshold; give the one of its training with --threshold"):
        load(fpath)
    x_bd = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    h_bs = x_bd @ state["W_enc"] + state["b_enc"]
    torch.testing.assert_close(encode(load(fpath, threshold=0.5), x_bd), torch.where(h_bs > 0.5, h_bs, 0))
    value_bk, feature_bk = h_bs.topk(3)  # as saev encoded before it had thresholds
    top_bs = torch.zeros_like(h_bs).scatter(1, feature_bk, value_bk)
    torch.testing.assert_close(encode(load(fpath, activation="topk:3"), x_bd), top_bs)


def test_one_number_is_not_normalised(tmp_path):
    save_saev(tmp_path / "sae.pt", torch.ones(1, 4), torch.zeros(4), torch.ones(4, 1), torch.zeros(1), RELU)
    load(tmp_path / "sae.pt")
    with pytest.raises(ConfigError, match="width 1, which layer_norm cannot normalise"):
        load(tmp_path / "sae.pt", input_norm="layer_norm")


def test_flags_replace_what_the_file_says(tmp_path):
    fpath = make_sae(tmp_path / "sae.pt", RELU)
    assert load(fpath).rules() == {"activation": "relu", "pre_bias": False, "input_norm": "none", "reconstructs": True}
    sae = load(fpath, activation="topk:3", pre_bias=True, input_norm="layer_norm")
    assert sae.rules() == {
        "activation": "topk",
        "k": 3,
        "relu": False,
        "pre_bias": True,
        "input_norm": "layer_norm",
        "reconstructs": True,
    }
    assert load(fpath, input_scale=0.5).rules()["input_scale"] == 0.5
    assert load(DATA / "sae_lens/topk_none_pre", activation="topk:3").activation == TopK(3, relu=True)


@pytest.mark.parametrize("name", ["sae_lens/gated_layer_norm_pre", "sae_lens/jumprelu_none_pre", "sparsify/groupmax"])
def test_a_lift_is_in_the_units_of_the_scores(name):
    """What replay asks where rounding alone may have kept a score out of its token's code."""
    x_bd, feats_bs = expected(name)
    sae, lift = load(DATA / name), 0.125
    with Encoder(sae, CPU, "fp32", 1) as encoder:
        for token, feature in (feats_bs[:, ::7] > 0).nonzero().tolist():
            feature *= 7
            lifted = encoder.encode_lifted(x_bd[token : token + 1], feature, lift)
            assert lifted == pytest.approx(float(feats_bs[token, feature]) + lift, rel=1e-5, abs=1e-5)


def test_bf16_is_close_to_fp32():
    for name in ("sae_lens/gated_layer_norm_pre", "sae_lens/jumprelu_constant_norm_rescale_pre", "sparsify/groupmax"):
        x_bd, feats_bs = expected(name)
        with Encoder(load(DATA / name), CPU, "bf16", 1) as encoder:
            codes = encoder.encode(x_bd, img_i=0, n_patches=1)
        both = feats_bs[codes.token_n, codes.feature_n] > 0  # rounding opens and closes a few gates
        assert both.float().mean() > 0.95 and both.sum() > 0.95 * (feats_bs > 0).sum()
        rough = codes.value_n[both]
        torch.testing.assert_close(rough, feats_bs[codes.token_n, codes.feature_n][both], rtol=0.05, atol=0.1)


def test_a_zero_token_has_no_norm_and_fires_as_the_bias_says():
    sae = load(DATA / "sae_lens/standard_constant_norm_rescale_pre")
    torch.testing.assert_close(encode(sae, torch.zeros(1, 20))[0], (sae.b_enc_s - sae.b_dec_d @ sae.w_enc_ds).relu())


def test_kinds_are_what_the_fixtures_say():
    assert isinstance(load(DATA / "sae_lens/gated_none_pre").activation, Gated)
    assert isinstance(load(DATA / "sae_lens/standard_layer_norm_pre").input_norm, LayerNorm)
    assert isinstance(load(DATA / "sae_lens/jumprelu_none_pre").activation, Threshold)
    assert isinstance(load(DATA / "sae_lens/standard_none_pre", input_scale=2.0).input_norm, Given)
    assert isinstance(load(DATA / "dictionary_learning/standard").activation, Relu)
