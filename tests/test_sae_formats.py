"""Every format is encoded as its own program did; what does not fit is refused by name, and nothing of it is run."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
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
from saev_dist.sae.safetensors import read_safetensors, write_safetensors
from tests.synthetic import BATCH_TOPK, RELU, make_sae

DATA = Path(__file__).parent / "data" / "sae-formats"
NAMES = sorted(str(fpath.parent.relative_to(DATA)) for fpath in DATA.glob("*/*/expected.safetensors"))
CPU = torch.device("cpu")


def encode(sae: Sae, x_bd: torch.Tensor) -> torch.Tensor:
    """Dense codes, float32 (b, s), of the program's encoder."""
    with Encoder(sae, CPU, "fp32", 1) as encoder:
        codes = encoder.encode(x_bd, img_i=0, n_patches=1)
    dense_bs = torch.zeros(len(x_bd), sae.d_sae)
    dense_bs[codes.token_n, codes.feature_n] = codes.value_n
    return dense_bs


def load(path: Path, **said) -> Sae:
    return load_sae(path, Overrides(**said)).sae


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and features that the original program computed."""
    tensors, _ = read_safetensors(DATA / name / "expected.safetensors")
    return tensors["x"], tensors["feats"]


def same_features(found_bs: torch.Tensor, expected_bs: torch.Tensor, atol: float = 1e-6) -> None:
    assert expected_bs.any()
    assert torch.equal(found_bs > 0, expected_bs > 0)
    torch.testing.assert_close(found_bs, expected_bs, rtol=1e-5, atol=atol)


@pytest.fixture
def copy(tmp_path):
    """A directory of the fixtures that a test may spoil."""

    def make(name: str) -> Path:
        shutil.copytree(DATA / name, tmp_path / name)
        return tmp_path / name

    return make


def edit(fpath: Path, /, **changes: object) -> None:
    """Change members of a JSON file (of its "trainer", where it has one); None removes one."""
    content = json.loads(fpath.read_text())
    target = content.get("trainer", content)
    for key, value in changes.items():
        target.pop(key) if value is None else target.__setitem__(key, value)
    fpath.write_text(json.dumps(content))


def edit_tensors(fpath: Path, /, **changes: torch.Tensor | None) -> None:
    """Change tensors of a safetensors file or a state dict; None removes one."""
    is_torch = fpath.suffix == ".pt"
    tensors = dict(torch.load(fpath, weights_only=True)) if is_torch else read_safetensors(fpath)[0]
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    torch.save(tensors, fpath) if is_torch else write_safetensors(fpath, tensors, {})


# The formats as their programs wrote them.


def test_all_fixtures_are_here():
    assert len(NAMES) == 25


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
    ("sae_lens", "topk, rescaled by decoder norm"): "sae_lens/topk_rescale",
    ("sae_lens", "gated"): "sae_lens/gated_{norm}_pre",
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
        if sae_format == "saev":  # test_extract compares their features with saev's
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


def test_top_k_of_sae_lens_before_version_6(copy):
    dpath = copy("sae_lens/topk_none_pre")
    x_bd, feats_bs = expected("sae_lens/topk_none_pre")
    for name in ("activation_fn", "activation_fn_str"):
        edit(dpath / "cfg.json", architecture="standard", k=None, **{name: "topk", "activation_fn_kwargs": {"k": 6}})
        same_features(encode(load(dpath), x_bd), feats_bs)
        edit(dpath / "cfg.json", k=6, **{name: None})


def test_a_fine_tuned_sae_scales_its_decoder_only(copy):
    dpath = copy("sae_lens/standard_none_pre")
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
def test_an_average_scale_must_be_given(copy, value):
    dpath = copy("sae_lens/standard_none_pre")
    x_bd, feats_bs = expected("sae_lens/standard_none_pre")
    edit(dpath / "cfg.json", normalize_activations=value)
    with pytest.raises(ConfigError, match="give it with --input-scale"):
        load(dpath)
    same_features(encode(load(dpath, input_scale=0.25), 4 * x_bd), feats_bs)
    same_features(encode(load(dpath, input_norm="none"), x_bd), feats_bs)  # as the self-check may advise


def test_the_scale_beside_a_checkpoint_of_training_is_read(copy):
    dpath = copy("sae_lens/standard_none_pre")
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
    }.items():
        (dpath / "activation_scaler.json").write_text(text)
        with pytest.raises(CheckpointError, match=why):
            load(dpath)
    edit(dpath / "cfg.json", normalize_activations="none")  # folded: nobody asks for it
    same_features(encode(load(dpath), x_bd), feats_bs)


def test_the_earliest_batch_topk_of_dictionary_learning_has_no_threshold(copy):
    dpath = copy("dictionary_learning/batch_top_k")
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
def test_a_training_backup_is_scaled_by_its_norm_factor(copy, name):
    """Trained on x / factor, whose features are the program's; scaled, it takes x and gives factor times those."""
    folder = {
        "AutoEncoder": "standard",
        "AutoEncoderTopK": "top_k",
        "BatchTopKSAE": "batch_top_k",
        "GatedAutoEncoder": "gated",
        "JumpReluAutoEncoder": "jumprelu",
    }[name]
    dpath = copy(f"dictionary_learning/{folder}")
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


def test_matryoshka_stores_its_weights_the_other_way_round(copy):
    dpath = copy("dictionary_learning/batch_top_k")
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


def test_a_transcoder_reads_its_input_as_it_is(copy):
    dpath = copy("sparsify/topk")
    x_bd, feats_bs = expected("sparsify/topk")
    edit(dpath / "cfg.json", transcode=True, skip_connection=True)
    weights = dpath / "sae.safetensors"
    with pytest.raises(CheckpointError, match="no tensor W_skip"):
        load(dpath)
    edit_tensors(weights, W_skip=torch.zeros(20, 20))
    sae = load(dpath)
    assert not sae.reconstructs
    same_features(encode(sae, x_bd - sae.b_dec_d), feats_bs)


def test_sparsify_of_before_2025_says_that_it_does_not_rank_by_magnitude(copy):
    dpath = copy("sparsify/topk")
    x_bd, feats_bs = expected("sparsify/topk")
    edit(dpath / "cfg.json", signed=False)
    same_features(encode(load(dpath), x_bd), feats_bs)
    edit(dpath / "cfg.json", signed=True)
    with pytest.raises(CheckpointError, match="signed is true; this version reads SAEs without it"):
        load(dpath)


def test_weights_that_do_not_fit_into_memory_are_not_called_damaged(copy, monkeypatch):
    dpath = copy("dictionary_learning/top_k")

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(CheckpointError, match="GB of weights do not fit into memory; free some"):
        load(dpath)


def test_latents_of_sparsify_may_be_a_multiple_of_the_width(copy):
    dpath = copy("sparsify/topk")
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


CONTRADICTIONS = {
    "threshold of a ReLU SAE": ({"threshold": 1.0}, "--threshold is for BatchTopK and JumpReLU"),
    "activation and threshold": ({"threshold": 1.0, "activation": "relu"}, "does not go with --threshold"),
    "activation unknown": ({"activation": "gelu"}, "it is relu, or topk:K"),
    "activation without k": ({"activation": "topk"}, "it is relu, or topk:K"),
    "k too large": ({"activation": "topk:25"}, "top_k is 25; the SAE has only 24 features"),
    "mean of another width": ({"input_mean": bytes(20)}, "--input-mean holds 5 numbers; "),
    "mean and norm": ({"input_norm": "layer_norm", "input_scale": 2.0}, "do not go with input_norm layer_norm"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_flags_that_contradict_the_file_or_each_other_are_refused(tmp_path, name):
    said, message = CONTRADICTIONS[name]
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        load(make_sae(tmp_path / "sae.pt", RELU), **said)
    assert message in str(caught.value)


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


# What is refused, by name.


def cfg(**changes):
    return lambda dpath: edit(next(dpath.glob("c*.json")), **changes)


def tensors(**changes):
    return lambda dpath: edit_tensors(
        next(fpath for fpath in (*dpath.glob("sae*.safetensors"), *dpath.glob("ae.pt"))), **changes
    )


LENS, SPARSIFY, DICTIONARY = "sae_lens/topk_none_pre", "sparsify/groupmax", "dictionary_learning/batch_top_k"
REFUSED = {
    "lens: architecture": (LENS, cfg(architecture="transcoder"), "architecture is 'transcoder'; this version reads standard,"),
    "lens: field": (LENS, cfg(subtract_mean=True), "fields that this version does not know (subtract_mean)"),
    "lens: norm": (LENS, cfg(normalize_activations="batch_norm"), "normalize_activations is 'batch_norm'"),
    "lens: norm a list": (LENS, cfg(normalize_activations=[1]), "normalize_activations is [1]"),
    "lens: reshaped": (LENS, cfg(reshape_activations="hook_z"), "reshape_activations is 'hook_z'"),
    "lens: k of another kind": ("sae_lens/standard_none_pre", cfg(k=6), "k is set, and the architecture is 'standard'"),
    "lens: no k": (LENS, cfg(k=None), "gives no values for k"),
    "lens: two k": (LENS, cfg(activation_fn_kwargs={"k": 9}), "gives 2 values for k"),
    "lens: k too large": (LENS, cfg(k=97), "top_k is 97; the SAE has only 96 features"),
    "lens: function": (LENS, cfg(activation_fn="tanh-relu"), "activation function 'tanh-relu'"),
    "lens: type": (LENS, cfg(apply_b_dec_to_input="yes"), "'apply_b_dec_to_input' is \"yes\"; it should be true or false"),
    "lens: bool for a number": (LENS, cfg(k=True), "'k' is true; it should be an integer"),
    "lens: width": (LENS, cfg(d_in=21), "W_enc is torch.float32 (20, 96); the config and the other tensors promise floats (21, 96)"),
    "lens: size absurd": (LENS, cfg(d_sae=10**40), "field 'd_sae' is 1e+40"),
    "lens: tensor missing": (LENS, tensors(b_enc=None), "holds no tensor b_enc; it holds"),
    "lens: tensor unknown": (LENS, tensors(b_skip=torch.ones(1)), "unknown tensors (b_skip) for architecture topk"),
    "lens: gate in a top-k": (LENS, tensors(b_gate=torch.ones(96)), "unknown tensors (b_gate)"),
    "lens: threshold missing": ("sae_lens/jumprelu_none_pre", tensors(threshold=None), "no tensor threshold"),
    "lens: threshold NaN": ("sae_lens/jumprelu_none_pre", tensors(threshold=torch.full((96,), torch.nan)), "96 of 96 values of threshold are NaN"),
    "lens: gate overflows": ("sae_lens/gated_none_pre", tensors(r_mag=torch.full((96,), 1e3)), "exp(r_mag) leaves the range"),
    "lens: zero row": ("sae_lens/topk_rescale", tensors(W_dec=torch.zeros(96, 20)), "a row of W_dec is zero"),
    "lens: no weights": (LENS, lambda dpath: (dpath / "sae_weights.safetensors").unlink(), "is no SAE by itself; it holds cfg.json"),
    "sparsify: activation": (SPARSIFY, cfg(activation="relu"), "activation is 'relu'; this version reads topk and groupmax"),
    "sparsify: field": (SPARSIFY, cfg(input_norm=True), "does not know (input_norm)"),
    "sparsify: lookup": (SPARSIFY, cfg(gram_lookup=True), "gram_lookup is true"),
    "sparsify: groups": (SPARSIFY, cfg(k=7), "96 features do not make 7 groups"),
    "sparsify: skip": (SPARSIFY, tensors(W_skip=torch.ones(20, 20)), "unknown tensors (W_skip) for a groupmax SAE without skip connection"),
    "dictionary: class": (DICTIONARY, cfg(dict_class="CrossCoder"), "dict_class is 'CrossCoder'; this version reads AutoEncoder,"),
    "dictionary: class of other tensors": (DICTIONARY, cfg(dict_class="AutoEncoder", k=None), "unknown tensors (b_dec, k, threshold) for AutoEncoder"),
    "dictionary: field": (DICTIONARY, cfg(use_pca_whitening=True), "does not know (use_pca_whitening)"),
    "dictionary: k stale": (DICTIONARY, cfg(k=9), "holds k tensor(6, dtype=torch.int32)"),
    "dictionary: threshold a vector": (DICTIONARY, tensors(threshold=torch.ones(96)), "threshold is torch.float32 (96,)"),
    "dictionary: integers": (DICTIONARY, tensors(b_dec=torch.ones(20, dtype=torch.int64)), "b_dec is torch.int64 (20,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(copy, name):
    source, spoil, message = REFUSED[name]
    dpath = copy(source)
    load(dpath)
    spoil(dpath)
    with pytest.raises(CheckpointError) as caught:
        load(dpath)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_of_saev_must_agree(tmp_path):
    fpath = make_sae(tmp_path / "sae.pt", RELU)
    line, body = fpath.read_bytes().split(b"\n", 1)
    for name, value in (("exp_factor", 5), ("d_vit", 7)):
        header = json.loads(line)
        header["cfg"][name] = value
        fpath.write_bytes(json.dumps(header).encode() + b"\n" + body)
        with pytest.raises(CheckpointError, match=f"{name} is {value}; the other fields make it"):
            load(fpath)
    header["cfg"] |= {"exp_factor": 4, "d_vit": 6}
    fpath.write_bytes(json.dumps(header).encode() + b"\n" + body)
    assert load(fpath).d_sae == 24


def test_a_directory_of_two_formats_needs_to_be_told(copy):
    dpath = copy(LENS)
    shutil.copy(DATA / "dictionary_learning/top_k/ae.pt", dpath)
    shutil.copy(DATA / "dictionary_learning/top_k/config.json", dpath)
    with pytest.raises(
        CheckpointError, match="holds the files of sae_lens and dictionary_learning; say which with --sae-format"
    ):
        load(dpath)
    assert load(dpath, sae_format="dictionary_learning").source.startswith("dictionary_learning")
    assert load(dpath, sae_format="sae_lens").source.startswith("SAELens")


def test_one_file_of_a_directory_is_refused():
    for name in ("sae_weights.safetensors", "cfg.json"):
        with pytest.raises(CheckpointError, match="no SAE by itself; name the directory that it is in"):
            load(DATA / LENS / name)


def test_a_fingerprint_covers_config_and_weights(copy):
    dpath = copy(LENS)
    prints = [load_sae(dpath, Overrides()).sha256]
    (dpath / "notes.txt").write_text("mine")
    assert load_sae(dpath, Overrides()).sha256 == prints[0]
    edit(dpath / "cfg.json", model_name="other")
    prints.append(load_sae(dpath, Overrides()).sha256)
    edit_tensors(dpath / "sae_weights.safetensors", b_dec=torch.ones(20))
    prints.append(load_sae(dpath, Overrides()).sha256)
    assert len(set(prints)) == 3


PLAIN_RULES = {"activation": "topk", "k": 3, "relu": True, "pre_bias": False, "input_norm": "none", "reconstructs": True}
PLAIN_REFUSED = {
    "activation": ({"activation": "gelu"}, "does not go with activation gelu"),
    "k missing": ({"k": None}, "has no field 'k'"),
    "field": ({"bias": True}, "does not know (bias)"),
    "threshold besides": ({"threshold": 1.0}, "threshold does not go with activation topk"),
    "norm": ({"input_norm": "batch"}, "input_norm is 'batch'"),
    "scale besides": ({"input_scale": 2.0}, "input_scale does not go with input_norm none"),
    "pre_bias missing": ({"pre_bias": None}, "has no field 'pre_bias'"),
    "mean missing": ({"input_norm": "given", "input_scale": 2.0}, "no tensor input_mean"),
    "threshold huge": ({"activation": "threshold", "threshold": 10**400, "k": None, "relu": None}, "is beyond any float"),
    "threshold infinite": ({"activation": "threshold", "threshold": float("inf"), "k": None, "relu": None}, "threshold is inf"),
}


@pytest.mark.parametrize("name", PLAIN_REFUSED)
def test_rules_of_the_plain_form_are_checked(tmp_path, name):
    changes, message = PLAIN_REFUSED[name]
    fpath, w = tmp_path / "sae.safetensors", torch.ones(2, 4)
    state = {"W_enc": w, "b_enc": torch.zeros(4), "W_dec": w.T, "b_dec": torch.zeros(2)}
    for rules in (PLAIN_RULES, {key: value for key, value in (PLAIN_RULES | changes).items() if value is not None}):
        metadata = {"format": "saev_dist.sae", "version": "1", "rules": json.dumps(rules)}
        write_safetensors(fpath, state, metadata)
        if rules is PLAIN_RULES:
            assert load(fpath).activation == TopK(3, relu=True)
    with pytest.raises(CheckpointError) as caught:
        load(fpath)
    assert message in str(caught.value)
    for member, message in {"version": "version '2'", "source": "source is '2"}.items():
        write_safetensors(fpath, state, metadata | {member: "2" if member == "version" else "2\x1b[2J\ud800"})
        with pytest.raises(CheckpointError, match=message):
            load(fpath)


# What strangers may send.

ESCAPED = Path("/tmp") / f"saev_dist_sae_escaped_{os.getpid()}"


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {ESCAPED}",)


def spoil_header(header: bytes, n_bytes: int | None = None, body: bytes = b""):
    def spoil(dpath: Path) -> None:
        n = len(header) if n_bytes is None else n_bytes
        (dpath / "sae_weights.safetensors").write_bytes(struct.pack("<Q", n) + header + body)

    return spoil


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4), name: str = "W_enc") -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def expanded(dpath: Path) -> None:
    """One stored number that claims to be a matrix of terabytes."""
    huge = torch.ones(1).expand(10**6, 10**6)
    torch.save(
        {"encoder.weight": huge, "decoder.weight": huge, "encoder.bias": torch.ones(1), "bias": torch.ones(1)}, dpath / "ae.pt"
    )
    edit(dpath / "config.json", activation_dim=10**6, dict_size=10**6)


def without_data(name: str):
    """A tensor that has a shape and no numbers."""

    def spoil(dpath: Path) -> None:
        state = torch.load(dpath / "ae.pt", weights_only=True)
        torch.save(state | {name: state[name].to("meta")}, dpath / "ae.pt")

    return spoil


def compressed(dpath: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    with zipfile.ZipFile(dpath / "ae.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(dpath / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def link_out(name: str):
    def spoil(dpath: Path) -> None:
        outside = dpath.parent.parent / "outside"
        (dpath / name).rename(outside)
        (dpath / name).symlink_to(outside)

    return spoil


HOSTILE = {
    "header larger than the file": (LENS, spoil_header(b"{}", 10**6), "claims 1,000,000 bytes; the file has 10"),
    "header of exabytes": (LENS, spoil_header(b"{}", 2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "header oversized": (LENS, spoil_header(b"{" + b" " * 2**21 + b"}"), "is the most for an SAE"),
    "header no JSON": (LENS, spoil_header(b"{]"), "is not JSON"),
    "header deep": (LENS, spoil_header(b'{"a":' + b"[" * 10**5), "is not JSON"),
    "header with a huge number": (LENS, spoil_header(b'{"a":' + b"9" * 10**5 + b"}"), "is not JSON"),
    "header a list": (LENS, spoil_header(b"[]"), "is not a safetensors file"),
    "header says a name twice": (LENS, spoil_header(b'{"a":{},"a":{}}'), "names a member twice"),
    "no header": (LENS, lambda dpath: (dpath / "sae_weights.safetensors").write_bytes(b"x"), "is not a safetensors file"),
    "dtype": (LENS, spoil_header(entry("I64", offsets=(0, 8)), body=bytes(8)), "dtype is 'I64'"),
    "shape overflows": (LENS, spoil_header(entry(shape=[2**32, 2**32]), body=bytes(4)), "takes 73,786,976,294,838,206,464 bytes"),
    "shape not sane": (LENS, spoil_header(entry(shape=[10**30]), body=bytes(4)), "are not sane"),
    "shape negative": (LENS, spoil_header(entry(shape=[-1]), body=bytes(4)), "are not sane"),
    "shape of texts": (LENS, spoil_header(entry(shape=["1"]), body=bytes(4)), "are not sane"),
    "offsets reversed": (LENS, spoil_header(entry(offsets=(4, 0)), body=bytes(4)), "hold -4"),
    "offsets too short": (LENS, spoil_header(entry(offsets=(0, 2)), body=bytes(4)), "hold 2"),
    "offsets beyond the end": (LENS, spoil_header(entry(), body=b""), "its tensors take 4 bytes; the file has 0"),
    "offsets with a gap": (LENS, spoil_header(entry(offsets=(4, 8)), body=bytes(8)), "W_enc starts at byte 4; the one before it ends at 0"),
    "bytes that no tensor holds": (LENS, spoil_header(entry(), body=bytes(8)), "its tensors take 4 bytes; the file has 8"),
    "tensors overlap": (LENS, spoil_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', body=bytes(4)), "b starts at byte 0; the one before it ends at 4"),
    "config oversized": (LENS, lambda dpath: (dpath / "cfg.json").write_bytes(b"[" + b"1," * 2**20), "is larger than 1,048,576 bytes"),
    "config deep": (LENS, lambda dpath: (dpath / "cfg.json").write_bytes(b"[" * 10**5), "is not JSON"),
    "config link": (LENS, link_out("cfg.json"), "cfg.json is a link out of its directory"),
    "weights link": (LENS, link_out("sae_weights.safetensors"), "sae_weights.safetensors is a link out of its directory"),
    "state dict link": (DICTIONARY, link_out("ae.pt"), "ae.pt is a link out of its directory"),
    "pickle": (DICTIONARY, lambda dpath: (dpath / "ae.pt").write_bytes(pickle.dumps(Bomb())), "nothing of it was run"),
    "pickle in torch's form": (DICTIONARY, lambda dpath: torch.save({"W_enc": Bomb()}, dpath / "ae.pt"), "nothing of it was run"),
    "pickle in a backup": (DICTIONARY, lambda dpath: torch.save({"ae": {}, "config": Bomb()}, dpath / "ae.pt"), "nothing of it was run"),
    "no pickle": (DICTIONARY, lambda dpath: (dpath / "ae.pt").write_bytes(b"\x00" * 100), "nothing of it was run"),
    "state dict truncated": (DICTIONARY, lambda dpath: os.truncate(dpath / "ae.pt", 9000), "truncated or damaged"),
    "state dict a list": (DICTIONARY, lambda dpath: torch.save([torch.ones(1)], dpath / "ae.pt"), "holds a list; expected a state dict"),
    "tensor larger than its storage": ("dictionary_learning/standard", expanded, "is larger than what the file stores of it"),
    "tensor without data": (DICTIONARY, without_data("b_dec"), "is larger than what the file stores of it"),
    "k without data": (DICTIONARY, without_data("k"), "One of them is stale"),
    "compressed tensors": (DICTIONARY, compressed, "holds compressed tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_run_nothing(copy, name):
    source, spoil, message = HOSTILE[name]
    dpath = copy(source)
    load(dpath)
    spoil(dpath)
    with pytest.raises(CheckpointError) as caught:
        load(dpath)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not ESCAPED.exists()


def test_links_within_the_directory_and_into_the_hubs_cache_are_followed(copy, tmp_path):
    dpath = copy(LENS)
    (dpath / "cfg.json").rename(dpath / "real.json")
    (dpath / "cfg.json").symlink_to("real.json")
    load(dpath)
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123/layer"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(dpath / name, blobs / name)
        (snapshot / name).symlink_to(Path("../../../blobs") / name)
    load(snapshot)


@pytest.mark.parametrize("name", ["sae_lens/gated_layer_norm_pre", "sae_lens/jumprelu_none_pre", "sparsify/groupmax"])
def test_a_lift_is_in_the_units_of_the_scores(name):
    """What replay asks where rounding alone may have kept a score out of its token's code."""
    x_bd, feats_bs = expected(name)
    sae, lift = load(DATA / name), 0.125
    for feature in range(0, 96, 7):
        lift_s = torch.zeros(96)
        lift_s[feature] = lift
        with Encoder(sae, CPU, "fp32", 1) as encoder:
            codes = encoder.encode(x_bd, img_i=0, n_patches=1, lift_s=lift_s)
        lifted_b = torch.zeros(len(x_bd)).index_put(
            (codes.token_n[codes.feature_n == feature],), codes.value_n[codes.feature_n == feature]
        )
        on_b = feats_bs[:, feature] > 0
        torch.testing.assert_close(lifted_b[on_b], feats_bs[on_b, feature] + lift, rtol=1e-5, atol=1e-5)


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
