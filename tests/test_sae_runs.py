"""Extract, verify and replay from every format; the same bytes on any number of ranks; flags that hold in all of them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist.cli import main
from saev_dist.sae.safetensors import read_safetensors
from tests.ranks import ENV, artifact_hashes, run_ranks
from tests.synthetic import make_shards

DATA = Path(__file__).parent / "data" / "sae-formats"
KINDS = [
    "sae_lens/gated_layer_norm_pre",
    "sae_lens/jumprelu_constant_norm_rescale_pre",
    "sae_lens/topk_rescale_none",
    "sparsify/groupmax",
    "dictionary_learning/batch_top_k",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Activations about as large as the fixtures' inputs."""
    acts = np.random.default_rng(3).normal(size=(41, 9, 20)).astype(np.float32)
    return make_shards(tmp_path_factory.mktemp("sae") / "shards", acts, cls_token=True)


def run(*args: object) -> None:
    main([*map(str, args), "--no-progress"])


def fails(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("saev-dist: error: ")
    return err


@pytest.mark.parametrize("name", KINDS)
def test_extract_verify_and_replay_run_from_every_format(tmp_path, shards, name):
    run("extract", "--shards", shards, "--sae", DATA / name, "--out", tmp_path / "run", "--top-k", 8, "--self-check", "off")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["sae"]["format"] == name.split("/")[0]
    assert manifest["metrics"]["l0"] > 1
    run("verify", "--run", tmp_path / "run", "--all")
    run("replay", "--run", tmp_path / "run", "--no-pictures", "--n-features", 3)
    assert (tmp_path / "run/visuals/index.html").exists()


@pytest.mark.parametrize("name", [name for name in KINDS if "batch" not in name])
def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, shards, name):
    hashes = []
    for n_ranks in (1, 3):
        out = tmp_path / str(n_ranks)
        args = ("--top-k", 8, "--batch-tokens", 30, "--metrics", "--self-check", "off")
        done = run_ranks("extract", "--shards", shards, "--sae", DATA / name, "--out", out, *args, n_ranks=n_ranks)
        assert done.returncode == 0, done.stderr
        hashes.append(artifact_hashes(out))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ["sae_lens/gated_layer_norm_pre", "sae_lens/jumprelu_constant_norm_rescale_pre"])
def test_the_reconstruction_is_in_the_units_of_the_activations(tmp_path, shards, name):
    """By the definition, with all tokens at once in float64."""
    run(
        "extract", "--shards", shards, "--sae", DATA / name, "--out", tmp_path / "run", "--metrics", "--self-check", "off",
        "--n-distributions", 96,
    )  # fmt: skip
    features = torch.load(tmp_path / "run/distributions.pt", weights_only=True).double().T
    state = read_safetensors(DATA / name / "sae_weights.safetensors")[0]
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(41, 9, 20)).astype(np.float32)).double().flatten(0, 1)
    decoded = features @ state["W_dec"].double() + state["b_dec"].double()
    if "layer_norm" in name:
        found = decoded * x.std(dim=1, keepdim=True) + x.mean(dim=1, keepdim=True)
    else:
        found = decoded * x.norm(dim=1, keepdim=True) / 20**0.5
    expected = (found - x).square().sum() / (x - x.mean(0)).square().sum()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["normalized_mse"] == pytest.approx(float(expected), rel=1e-5)


def test_flags_are_part_of_the_run_and_hold_in_replay(tmp_path, shards, capsys):
    sae = tmp_path / "sae"
    shutil.copytree(DATA / "sae_lens/standard_none_pre", sae)
    np.save(tmp_path / "mean.npy", np.linspace(0, 1, 20))
    flags = ["--no-pre-bias", "--activation", "topk:5", "--input-mean", tmp_path / "mean.npy", "--input-scale", "2.5"]
    args = ["extract", "--shards", shards, "--sae", sae, "--out", tmp_path / "run", "--self-check", "off"]
    run(*args, *flags)
    (tmp_path / "mean.npy").rename(tmp_path / "moved.npy")  # the manifest holds what was in it
    run("verify", "--run", tmp_path / "run", "--all")
    capsys.readouterr()
    flags[4] = tmp_path / "moved.npy"
    main([str(arg) for arg in [*args, *flags]])
    assert "nothing to do" in capsys.readouterr().out
    for changed in ([*flags, "--pre-bias"], flags[:3] + flags[5:], [*flags[:5], "--input-scale", "2"], flags[:1] + flags[3:]):
        assert "holds a run with other settings (sae_" in fails(capsys, *args, *changed)
    np.save(tmp_path / "moved.npy", np.linspace(0, 1.01, 20))
    assert "holds a run with other settings (sae_input_mean_sha256" in fails(capsys, *args, *flags)
    cfg = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(cfg | {"device": "cuda"}))
    assert "is not what" in fails(capsys, "verify", "--run", tmp_path / "run")


def test_a_converted_sae_gives_the_same_artifacts(tmp_path, shards, capsys):
    mean = tmp_path / "mean.npy"
    np.save(mean, np.linspace(0, 1, 20))
    flags = ["--no-pre-bias", "--input-mean", mean, "--input-scale", "0.5"]
    source, target = DATA / "dictionary_learning/gated", tmp_path / "sae.safetensors"
    main(["convert", str(source), str(target), *map(str, flags)])
    assert "input_scale 0.5" in capsys.readouterr().out
    assert "is there already" in fails(capsys, "convert", source, target)
    for directory in (".", "/", tmp_path):  # the first two have no name, and so none that a file beside them could have
        line = fails(capsys, "convert", source, directory, "--force")
        assert f"{directory} is a directory; name a file in it, such as " in line
    assert "cannot write: File name too long" in fails(capsys, "convert", source, tmp_path / ("x" * 300))
    main(["convert", str(source), str(target), *map(str, flags), "--force"])
    common = ["extract", "--shards", shards, "--metrics", "--self-check", "off"]
    run(*common, "--sae", source, "--out", tmp_path / "source", *flags)
    run(*common, "--sae", target, "--out", tmp_path / "target")
    assert artifact_hashes(tmp_path / "source") == artifact_hashes(tmp_path / "target")
    assert "cannot write" in fails(capsys, "convert", source, target / "below.safetensors")


def test_a_transcoder_has_no_reconstruction(tmp_path, shards, capsys):
    sae = tmp_path / "sae"
    shutil.copytree(DATA / "sparsify/topk", sae)
    cfg = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(cfg | {"transcode": True}))
    args = ["extract", "--shards", shards, "--sae", sae, "--out", tmp_path / "run"]
    assert "predicts another one" in fails(capsys, *args, "--metrics")
    run(*args, "--self-check", "strict")


def test_inspect_tells_the_rules(capsys):
    main(["inspect", str(DATA / "sae_lens/jumprelu_layer_norm_pre")])
    text = capsys.readouterr().out
    assert "SAELens, jumprelu" in text and 'input_norm "layer_norm"' in text and "threshold " in text


@pytest.fixture
def cache(tmp_path):
    """The cache of huggingface_hub, as it is after a download."""
    root = tmp_path / "hub/models--owner--repo"
    commit, name = "0123456789abcdef0123456789abcdef01234567", "layer 3, k=32"
    for folder in ("blobs", "refs", f"snapshots/{commit}/{name}"):
        (root / folder).mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    for fpath in (DATA / "sae_lens/topk_none_pre").glob("[!e]*"):
        shutil.copy(fpath, root / "blobs" / fpath.name)
        (root / f"snapshots/{commit}/{name}" / fpath.name).symlink_to(f"../../../blobs/{fpath.name}")
    return tmp_path / "hub"


def test_the_hubs_cache_is_used_without_a_network(tmp_path, shards, cache, monkeypatch):
    monkeypatch.setitem(ENV, "HF_HUB_CACHE", str(cache))
    monkeypatch.setitem(ENV, "HF_HUB_OFFLINE", "1")
    for revision in ("", "@main", "@0123456789abcdef0123456789abcdef01234567"):
        done = run_ranks("inspect", f"hf://owner/repo/layer 3, k=32{revision}")
        assert done.returncode == 0 and "SAELens, topk" in done.stdout, done.stderr
    args = [
        "extract",
        "--shards",
        shards,
        "--sae",
        "hf://owner/repo/layer 3, k=32",
        "--out",
        tmp_path / "run",
        "--self-check",
        "off",
    ]
    assert run_ranks(*args).returncode == 0
    done = run_ranks("verify", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert run_ranks("verify", "--run", tmp_path / "run", "--sae", "hf://owner/repo/layer 3, k=32@main").returncode == 0
    for name, message in {
        "hf://owner/other": "is not in the cache and cannot be downloaded",
        "hf://owner/repo/layer_4": "holds no layer_4 at this revision",
        "hf://owner": "expected hf://owner/repo",
        "hf://owner/repo/../../x": "expected hf://owner/repo",
        "hf://owner/repo/layer*": "expected hf://owner/repo",
    }.items():
        done = run_ranks("inspect", name)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_hub_without_its_library_or_a_network_is_one_line(cache, monkeypatch, capsys):
    monkeypatch.setitem(ENV, "HF_HUB_CACHE", str(cache))
    for endpoint in ("http://127.0.0.1:9", "proxy.example"):  # refused; and no URL, which is an error of the HTTP library
        monkeypatch.setitem(ENV, "HF_ENDPOINT", endpoint)
        done = run_ranks("inspect", "hf://owner/other")
        assert done.returncode == 1, done.stderr
        assert "hf://owner/other is not in the cache and cannot be downloaded" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in fails(capsys, "inspect", "hf://owner/repo")
