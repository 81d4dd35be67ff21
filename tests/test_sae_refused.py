"""SAE files that do not fit are refused by name, and nothing of them is run."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from saev_dist.errors import CheckpointError, ConfigError
from saev_dist.sae.load import Overrides, load_sae
from saev_dist.sae.model import TopK
from saev_dist.sae.safetensors import write_safetensors
from tests.sae_files import DATA, edit, edit_tensors, load
from tests.synthetic import RELU, make_sae

CONTRADICTIONS = {
    "threshold of a ReLU SAE": ({"threshold": 1.0}, "--threshold is for BatchTopK and JumpReLU"),
    "activation and threshold": ({"threshold": 1.0, "activation": "relu"}, "does not go with --threshold"),
    "activation unknown": ({"activation": "gelu"}, "it is relu, or topk:K"),
    "activation without k": ({"activation": "topk"}, "it is relu, or topk:K"),
    "k too large": ({"activation": "topk:25"}, "K is 25; the SAE has only 24 features"),
    "mean of another width": ({"input_mean": bytes(20)}, "--input-mean holds 5 numbers; "),
    "mean and norm": ({"input_norm": "layer_norm", "input_scale": 2.0}, "do not go with input_norm layer_norm"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_flags_that_contradict_the_file_or_each_other_are_refused(tmp_path, name):
    said, message = CONTRADICTIONS[name]
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        load(make_sae(tmp_path / "sae.pt", RELU), **said)
    assert message in str(caught.value)


# What is refused, by name.


def check_refused(copy_sae, source, spoil, message):
    """An SAE that loads does not any more once it is spoilt, and one line says why."""
    dpath = copy_sae(source)
    load(dpath)
    spoil(dpath)
    with pytest.raises(CheckpointError) as caught:
        load(dpath)
    assert message in str(caught.value) and "\n" not in str(caught.value)


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
    "lens: whitened": (LENS, cfg(normalize_activations="covariance_whitening"), "normalize_activations is 'covariance_whitening'"),
    "lens: norm a list": (LENS, cfg(normalize_activations=[1]), "normalize_activations is [1]"),
    "lens: reshaped": (LENS, cfg(reshape_activations="hook_z"), "reshape_activations is 'hook_z'"),
    "lens: architecture with fields of its own": (LENS, cfg(architecture="matching_pursuit", max_iterations=3), "architecture is 'matching_pursuit'"),
    "lens: k of another kind": ("sae_lens/standard_none_pre", cfg(k=6), "k is set, and the architecture is 'standard'"),
    "lens: no k": (LENS, cfg(k=None), "gives no values for k"),
    "lens: two k": (LENS, cfg(activation_fn_kwargs={"k": 9}), "gives 2 values for k"),
    "lens: k too large": (LENS, cfg(k=97), "K is 97; the SAE has only 96 features"),
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
    "lens: zero row": ("sae_lens/topk_rescale_none", tensors(W_dec=torch.zeros(96, 20)), "a row of W_dec is zero"),
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
def test_what_is_not_known_is_refused_by_name(copy_sae, name):
    check_refused(copy_sae, *REFUSED[name])


def test_a_long_text_out_of_a_file_leaves_both_ends_of_the_line(copy_sae):
    dpath = copy_sae(LENS)
    edit(dpath / "cfg.json", architecture="\x1b" * 100_000)
    with pytest.raises(CheckpointError) as err:
        load(dpath)
    text = str(err.value)
    assert len(text) < 9_000 and text.startswith(f"{dpath}/cfg.json: architecture is") and "this version reads" in text


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


def test_a_directory_of_two_formats_needs_to_be_told(copy_sae):
    dpath = copy_sae(LENS)
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


@pytest.mark.parametrize("overrides", [Overrides(), Overrides(sae_format="saev")], ids=["recognised", "told"])
def test_a_pipe_is_not_waited_for(tmp_path, overrides):
    os.mkfifo(tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"sae\.pt is neither a file nor a directory; name the file"):
        load_sae(tmp_path / "sae.pt", overrides)


def test_a_fingerprint_covers_config_and_weights(copy_sae):
    dpath = copy_sae(LENS)
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


def without_storage(dpath: Path) -> None:
    """In torch's older form, which names each storage twice: in the tensor, and in a list at the end, here another one."""
    tensor = torch.ones(3)
    with open(dpath / "ae.pt", "wb") as file:
        torch.save({"b_dec": tensor}, file, _use_new_zipfile_serialization=False)
    head, key, tail = (dpath / "ae.pt").read_bytes().rpartition(str(tensor.untyped_storage()._cdata).encode())
    (dpath / "ae.pt").write_bytes(head + b"7" * len(key) + tail)


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
    "state dict ends amid a number": (DICTIONARY, lambda dpath: (dpath / "ae.pt").write_bytes(b"\x80\x02M"), "truncated or damaged"),
    "state dict without a storage": (DICTIONARY, without_storage, "truncated or damaged"),
    "state dict a list": (DICTIONARY, lambda dpath: torch.save([torch.ones(1)], dpath / "ae.pt"), "holds a list; expected a state dict"),
    "tensor larger than its storage": ("dictionary_learning/standard", expanded, "is larger than what the file stores of it"),
    "tensor without data": (DICTIONARY, without_data("b_dec"), "is larger than what the file stores of it"),
    "k without data": (DICTIONARY, without_data("k"), "One of them is stale"),
    "compressed tensors": (DICTIONARY, compressed, "holds compressed tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_run_nothing(copy_sae, name):
    check_refused(copy_sae, *HOSTILE[name])
    assert not ESCAPED.exists()


def test_links_within_the_directory_and_into_the_hubs_cache_are_followed(copy_sae, tmp_path):
    dpath = copy_sae(LENS)
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
