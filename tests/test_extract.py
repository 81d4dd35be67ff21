"""Job 1 end to end: the same bytes on any number of ranks, what saev itself computed, what is refused."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import saev_dist.extract
from saev_dist import job
from saev_dist.cli import main
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.errors import DataError
from saev_dist.extract import run
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.saev import load_saev
from saev_dist.statistics import make_bundle, state_bytes, state_names
from saev_dist.store import Run
from tests.ranks import artifact_hashes, run_cli, run_ranks
from tests.synthetic import RELU, TOPK, make_acts, make_sae, make_shards

SAEV = Path(__file__).parent / "data"


def load(out: Path, stem: str):
    return torch.load(out / f"{stem}.pt", weights_only=True)


def read_shards(dpath: Path, layer: int) -> np.ndarray:
    """Content tokens of a layer by plain NumPy: float32 (images, patches, d_model)."""
    shards = Shards.open(dpath, layer)
    n_tokens = shards.n_patches + shards.cls_token
    parts = []
    for name, n in zip(shards.names, shards.examples, strict=True):
        count = n * len(shards.layers) * n_tokens * shards.d_model
        raw = np.fromfile(dpath / name, "<f4", count).reshape(n, len(shards.layers), n_tokens, shards.d_model)
        parts.append(raw[:, shards.layers.index(layer), int(shards.cls_token) :])
    return np.concatenate(parts)


@pytest.mark.parametrize("rank_by", ["patch", "image"])
@pytest.mark.parametrize("activation", [RELU, TOPK], ids=lambda activation: activation["cls"])
def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, activation, rank_by):
    rng = np.random.default_rng(5)
    acts = rng.normal(size=(41, 9, 32)).astype(np.float32)
    shards = make_shards(tmp_path / "shards", acts, cls_token=True)
    sae = make_sae(tmp_path / "sae.pt", activation, d_model=32, d_sae=101)
    hashes = []
    for n_ranks in (1, 2, 3, 6):
        out = tmp_path / f"run{n_ranks}"
        done = run_ranks(
            "extract", "--shards", shards, "--sae", sae, "--out", out, "--rank-by", rank_by, "--top-k", 8,
            "--batch-tokens", 30, "--max-distribution-samples", 100, "--metrics", n_ranks=n_ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not (out / "partials").exists()
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["world_size"] == n_ranks
        assert sum(rank["n_tokens"] for rank in manifest["ranks"]) == 41 * 9
        hashes.append(artifact_hashes(out))
    assert set(hashes[0]) == {path.name for path in Run(out).artifacts()}
    assert hashes[1:] == hashes[:1] * 3


@pytest.mark.parametrize("settings", [{}, {"metrics": True}, {"percentile_estimator": "saev"}], ids=str)
def test_the_size_of_a_state_is_told_without_making_it(tmp_path, settings):
    sae, shards = load_saev(make_sae(tmp_path / "sae.pt")), Shards.open(make_shards(tmp_path / "shards", make_acts(3)))
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path, top_k=7, **settings)
    state = make_bundle(cfg, sae, shards).state_dict()
    assert state_bytes(cfg, sae, shards) == sum(tensor.nbytes for tensor in state.values())
    assert state_names(cfg, sae, shards) == sorted(state)


def test_any_number_of_threads_writes_the_same_bytes(tmp_path):
    acts = np.random.default_rng(6).normal(size=(600, 9, 96)).astype(np.float32)
    shards = make_shards(tmp_path / "shards", acts, imgs_per_shard=500)
    sae = make_sae(tmp_path / "sae.pt", TOPK, d_model=96, d_sae=1001)
    for n_threads in (1, 2):
        out = tmp_path / str(n_threads)
        args = ("extract", "--shards", shards, "--sae", sae, "--out", out, "--metrics", "--pre-bias")
        done = (run_cli if n_threads == 2 else run_ranks)(*args, n_threads=n_threads)  # OMP_NUM_THREADS of a process of its own
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "manifest.json").read_text())["machine"]["n_threads"] == min(n_threads, os.cpu_count() or 1)
    assert artifact_hashes(tmp_path / "1") == artifact_hashes(tmp_path / "2")


def test_batches_of_one_piece_keep_all_threads_busy(tmp_path, monkeypatch):
    shards, sae = make_shards(tmp_path / "shards", make_acts(21)), make_sae(tmp_path / "sae.pt")
    met, encode = threading.Barrier(3), Encoder._encode

    def meet_and_encode(*args):
        met.wait(timeout=30)
        return encode(*args)

    monkeypatch.setattr(Encoder, "_encode", meet_and_encode)
    monkeypatch.setattr(job, "batch_threads", lambda device: 3)
    run(Extract(shards=shards, sae=sae, out=tmp_path / "run", batch_tokens=1, self_check="off", progress=False))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["plan"] == {"n_batches": 21, "images_per_batch": 1} and manifest["machine"]["n_threads"] == 3


def test_more_ranks_than_batches_work(tmp_path):
    shards = make_shards(tmp_path / "shards", make_acts(2))
    sae = make_sae(tmp_path / "sae.pt")
    for n_ranks in (1, 3):
        args = ("extract", "--shards", shards, "--sae", sae, "--out", tmp_path / str(n_ranks))
        done = run_ranks(*args, n_ranks=n_ranks)
        assert done.returncode == 0, done.stderr
    assert artifact_hashes(tmp_path / "1") == artifact_hashes(tmp_path / "3")


FIXTURES = {"saev-1.1/relu": 7, "saev-1.1/topk": 0, "saev-2.1/topk": 11}


@pytest.mark.parametrize("name", FIXTURES)
def test_statistics_agree_with_saev(tmp_path, name):
    expected = SAEV / name / "expected"
    run(
        Extract(
            shards=SAEV / name / "shards",
            sae=SAEV / name / "sae.pt",
            out=tmp_path,
            layer=FIXTURES[name],
            percentile_estimator="saev",
            metrics=True,
            batch_tokens=50,
            top_k=16,
            rank_by="image",
            progress=False,
        )
    )
    for stem in ("mean_values", "sparsity"):
        theirs = torch.load(expected / f"{stem}.pt", weights_only=True)
        torch.testing.assert_close(load(tmp_path, stem), theirs, rtol=1e-5, atol=1e-7, equal_nan=True)
    if (expected / "metrics.json").exists():
        theirs, ours = (json.loads((dpath / "metrics.json").read_text()) for dpath in (expected, tmp_path))
        assert theirs.keys() - {"n_elements"} <= ours.keys()
        assert all(ours[key] == pytest.approx(theirs[key], rel=1e-5) for key in theirs.keys() & ours.keys())
    if (expected / "img_acts.pt").exists():
        img_acts = scipy.sparse.load_npz(tmp_path / "img_acts.npz").toarray()
        theirs = torch.load(expected / "img_acts.pt", weights_only=True).numpy()
        np.testing.assert_allclose(img_acts, theirs, rtol=1e-5, atol=1e-6)
        theirs = torch.load(expected / "percentiles_p99.pt", weights_only=True)
        torch.testing.assert_close(load(tmp_path, "percentiles_p99"), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["saev-1.1/relu", "saev-1.1/topk"])
def test_strongest_images_agree_with_saev(tmp_path, name):
    """saev repeats an image once per strong patch and pads with zeros, so it lists fewer images than we do."""
    top_k = 20
    run(
        Extract(
            shards=SAEV / name / "shards",
            sae=SAEV / name / "sae.pt",
            out=tmp_path,
            layer=FIXTURES[name],
            top_k=top_k,
            rank_by="image",
            progress=False,
        )
    )
    theirs_v = torch.load(SAEV / name / "expected/top_values.pt", weights_only=True).amax(-1)
    theirs_i = torch.load(SAEV / name / "expected/top_img_i.pt", weights_only=True)
    ours_v, ours_i = load(tmp_path, "top_values"), load(tmp_path, "top_img_i")
    n_compared = 0
    for s in range(len(ours_v)):
        theirs = {int(i): float(v) for v, i in zip(theirs_v[s], theirs_i[s], strict=True) if v > 0}
        ours = {int(i): float(v) for v, i in zip(ours_v[s], ours_i[s], strict=True) if i >= 0}
        strongest = sorted(theirs, key=lambda i: -theirs[i])
        assert list(ours)[: len(theirs)] == strongest
        for i in theirs:
            assert ours[i] == pytest.approx(theirs[i], rel=1e-5)
        n_compared += len(theirs)
    assert n_compared > 500


def test_codes_equal_saevs_token_activations(tmp_path):
    """saev-2.1/relu left out tokens of label 0; its token activations still hold all tokens' codes or only the rest."""
    for name, layer in (("saev-2.1/relu", 3), ("saev-2.1/topk", 11)):
        out = tmp_path / name
        run(
            Extract(
                shards=SAEV / name / "shards",
                sae=SAEV / name / "sae.pt",
                out=out,
                layer=layer,
                n_distributions=10**6,
                progress=False,
            )
        )
        theirs = scipy.sparse.load_npz(SAEV / name / "expected/token_acts.npz").toarray()
        ours = load(out, "distributions").numpy().T
        assert ours.shape == theirs.shape
        kept = np.ones(len(ours), bool)
        if name == "saev-2.1/relu":
            kept = np.fromfile(SAEV / name / "shards/labels.bin", np.uint8) != 0
        np.testing.assert_allclose(ours[kept], theirs[kept], rtol=1e-5, atol=1e-5)


def test_statistics_without_ignored_labels_agree_with_saev(tmp_path):
    """The kept tokens of saev-2.1/relu as images of one patch. Its sparsity divides by all tokens, a known fault."""
    source = SAEV / "saev-2.1/relu"
    acts, labels = read_shards(source / "shards", 3), np.fromfile(source / "shards/labels.bin", np.uint8)
    kept = acts.reshape(len(labels), -1)[labels != 0]
    shards = make_shards(tmp_path / "shards", kept[:, None], imgs_per_shard=50)
    run(Extract(shards=shards, sae=source / "sae.pt", out=tmp_path / "run", metrics=True, progress=False))
    theirs = torch.load(source / "expected/mean_values.pt", weights_only=True)
    torch.testing.assert_close(load(tmp_path / "run", "mean_values"), theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    theirs = torch.load(source / "expected/sparsity.pt", weights_only=True) * len(labels) / len(kept)
    torch.testing.assert_close(load(tmp_path / "run", "sparsity"), theirs, rtol=1e-5, atol=1e-6)
    theirs = json.loads((source / "expected/metrics.json").read_text())
    assert json.loads((tmp_path / "run/metrics.json").read_text())["normalized_mse"] == pytest.approx(
        theirs["normalized_mse"], rel=1e-5
    )


def test_batch_topk_is_encoded_with_its_threshold(tmp_path):
    source = SAEV / "saev-2.1/btopk"
    run(Extract(shards=source / "shards", sae=source / "sae.pt", out=tmp_path, layer=1, n_distributions=128, progress=False))
    sae = load_saev(source / "sae.pt")
    threshold = sae.activation.threshold
    h = read_shards(source / "shards", 1).reshape(-1, 32) @ sae.w_enc_ds.numpy() + sae.b_enc_s.numpy()
    codes = load(tmp_path, "distributions").numpy().T
    assert threshold > 0 and ((h > 0) & (h <= threshold)).any(), "the fixture must tell the threshold from ReLU"
    np.testing.assert_allclose(codes, np.where(h > threshold, h, 0), rtol=1e-5, atol=1e-5)


def test_pre_bias_subtracts_the_decoders_bias(tmp_path):
    acts = make_acts()
    sae = make_sae(tmp_path / "sae.pt")
    for flag, shift in (("--pre-bias", 0), ("--no-pre-bias", 1)):
        shards = make_shards(tmp_path / f"shards{shift}", acts - shift)
        main(["extract", "--shards", str(shards), "--sae", str(sae), "--out", str(tmp_path / flag), flag, "--no-progress"])
    assert artifact_hashes(tmp_path / "--pre-bias") == artifact_hashes(tmp_path / "--no-pre-bias")


def test_bf16_is_close_to_fp32(tmp_path):
    rng = np.random.default_rng(3)
    shards = make_shards(tmp_path / "shards", rng.normal(size=(20, 5, 64)).astype(np.float32))
    sae = make_sae(tmp_path / "sae.pt", d_model=64)
    for precision in ("fp32", "bf16"):
        run(Extract(shards=shards, sae=sae, out=tmp_path / precision, precision=precision, top_k=5, progress=False))
    exact, rough = load(tmp_path / "fp32", "top_values"), load(tmp_path / "bf16", "top_values")
    torch.testing.assert_close(exact, rough, rtol=0.02, atol=0.02)
    assert not torch.equal(exact, rough)


def test_a_zero_padded_last_shard_reads_as_a_short_one(tmp_path):
    acts, sae = make_acts(), make_sae(tmp_path / "sae.pt")
    for padded in (False, True):
        shards = make_shards(tmp_path / f"any name {padded}", acts)
        if padded:
            with open(shards / "acts000003.bin", "ab") as file:
                file.write(bytes(5 * 5 * 6 * 4))
        run(Extract(shards=shards, sae=sae, out=tmp_path / f"run{padded}", progress=False))
    assert artifact_hashes(tmp_path / "runFalse") == artifact_hashes(tmp_path / "runTrue")


def test_a_finished_run_is_left_as_it_is_and_another_is_refused(tmp_path, capsys):
    shards, sae, out = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt"), tmp_path / "run"
    args = ["extract", "--shards", str(shards), "--sae", str(sae), "--out", str(out), "--no-progress"]
    main(args)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    main(args)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^1$"):
        main([*args, "--top-k", "5"])
    assert "top_k: there 128, here 5" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    main([*args, "--top-k", "5", "--percentile", "50", "--force"])
    assert load(out, "top_values").shape == (24, 5)
    assert not (out / "percentiles_p99.pt").exists(), "an artifact of the run before"


def test_artifacts_of_unknown_origin_are_not_overwritten(tmp_path, capsys):
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/top_values.pt").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["extract", "--shards", str(shards), "--sae", str(sae), "--out", str(tmp_path / "run")])
    assert "no manifest.json" in capsys.readouterr().err
    assert (tmp_path / "run/top_values.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("key", ["n_examples", "n_imgs"])
def test_a_shard_of_no_images_is_passed_over(tmp_path, key):
    """saev's writer opens another one where the last has just become full, and lists it."""
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    run(Extract(shards=shards, sae=sae, out=tmp_path / "before", progress=False))
    entries = json.loads((shards / "shards.json").read_text())
    (shards / "shards.json").write_text(json.dumps([*entries, {"name": "acts000099.bin", key: 0}]))
    run(Extract(shards=shards, sae=sae, out=tmp_path / "after", progress=False))
    assert artifact_hashes(tmp_path / "before") == artifact_hashes(tmp_path / "after")
    for lone, said in (([{"name": "a.bin", key: 0}], "only shards of no images"), ([{"name": "a.bin", key: False}], "false")):
        (shards / "shards.json").write_text(json.dumps(lone))
        with pytest.raises(DataError, match=said):
            Shards.open(shards)


def test_no_percentile_exceeds_the_largest_score(tmp_path):
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    run(Extract(shards=shards, sae=sae, out=tmp_path / "run", percentile=100, progress=False))
    largest, percentile = load(tmp_path / "run", "top_values")[:, 0], load(tmp_path / "run", "percentiles_p100")
    fires = largest > 0
    assert (percentile[fires] <= largest[fires]).all() and (percentile[fires] > largest[fires] / 1.032).all()
    assert fires.any() and not fires.all() and (percentile[~fires] == 0).all()


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path, capsys):
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    main(
        [
            "extract",
            "--shards",
            str(shards),
            "--sae",
            str(sae),
            "--out",
            str(tmp_path / "run"),
            "--dry-run",
            "--batch-tokens",
            "11",
        ]
    )
    text = capsys.readouterr().out
    assert "115: 23 images × 5 patches" in text
    assert "13 of up to 2 images (10 tokens)" in text
    assert "2.8 kB from 4 shards" in text
    assert not (tmp_path / "run").exists()


def test_what_cannot_fit_is_refused_before_the_start(tmp_path, capsys):
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", str(shards), "--sae", str(sae), "--out", str(tmp_path / "run"), "--top-k", str(10**9)]
    with pytest.raises(SystemExit, match=r"^1$"):
        main(args)
    assert "of host memory" in capsys.readouterr().err


def test_shards_of_older_protocols_read_the_same(tmp_path):
    acts, sae = make_acts(), make_sae(tmp_path / "sae.pt")
    shards = make_shards(tmp_path / "shards", acts)
    run(Extract(shards=shards, sae=sae, out=tmp_path / "2.1", progress=False))
    md = json.loads((shards / "metadata.json").read_text())
    old = {"family": "vit_family", "ckpt": "vit_ckpt", "content_tokens_per_example": "n_patches_per_img", "d_model": "d_vit"}
    old |= {"n_examples": "n_imgs", "max_tokens_per_shard": "max_patches_per_shard"}
    for protocol in ("1.0.0", "1.1"):
        renamed = {old.get(key, key): value for key, value in md.items() if key != "dataset"} | {"protocol": protocol}
        (shards / "metadata.json").write_text(json.dumps(renamed))
        entries = [{"name": name, "n_imgs": n} for name, n in zip(*_listed(shards), strict=True)]
        (shards / "shards.json").write_text(json.dumps(entries))
        run(Extract(shards=shards, sae=sae, out=tmp_path / protocol, progress=False))
        assert artifact_hashes(tmp_path / protocol) == artifact_hashes(tmp_path / "2.1")


def _listed(dpath: Path) -> tuple[list[str], list[int]]:
    entries = json.loads((dpath / "shards.json").read_text())
    return [entry["name"] for entry in entries], [entry.get("n_examples", entry.get("n_imgs")) for entry in entries]


def test_the_writer_refuses_a_directory_in_use(tmp_path):
    make_shards(tmp_path / "shards", make_acts())
    with pytest.raises(DataError, match="already holds shards"):
        make_shards(tmp_path / "shards", make_acts())


def test_missing_rows_of_a_rank_stop_the_run(tmp_path, monkeypatch, capsys):
    """As where the ranks do not share a file system, or a second run cleared this one's partials."""
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", str(shards), "--sae", str(sae), "--out", str(tmp_path / "run"), "--no-progress"]
    merge = saev_dist.extract._merge
    for name in ("img_acts_data", "distributions"):

        def lose(bundle, world, name=name):
            (path,) = tmp_path.glob(f"run/partials/{name}.00000-*.bin")
            path.unlink()
            return merge(bundle, world)

        monkeypatch.setattr(saev_dist.extract, "_merge", lose)
        with pytest.raises(SystemExit, match=r"^1$"):
            main(args)
        assert f"the ranks' {name} files hold 0 bytes; expected " in capsys.readouterr().err
        assert not list((tmp_path / "run").glob("*.*"))


def test_the_manifest_says_how_large_batches_are(tmp_path):
    """Not how large they might be: no shard holds as many images as --batch-tokens allows."""
    shards, sae = make_shards(tmp_path / "shards", make_acts(9), imgs_per_shard=4), make_sae(tmp_path / "sae.pt")
    run(Extract(shards=shards, sae=sae, out=tmp_path / "run", self_check="off", progress=False))
    assert json.loads((tmp_path / "run/manifest.json").read_text())["plan"] == {"n_batches": 3, "images_per_batch": 4}
