"""`verify`: passes on sound runs, and says why it fails on every kind of swap."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist import extract, verify
from saev_dist.choose import choose_slots, deal
from saev_dist.config import Extract, Verify
from saev_dist.data import reader
from saev_dist.errors import Preempted
from saev_dist.finished import FinishedRun
from saev_dist.reencode import TOLERANCE, Check, _is_on_edge, reencode, verify_tokens
from saev_dist.sae import product
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.model import Gated, GroupMax, Sae, Threshold, TopK
from saev_dist.sae.saev import save_saev
from tests.ranks import fails, run_ranks
from tests.synthetic import BATCH_TOPK, RELU, TOPK, dense_codes, make_acts, make_sae, make_shards, make_weights

DATA = Path(__file__).parent / "data"
FIXTURES = {"saev-1.1/relu": 7, "saev-1.1/topk": 0, "saev-2.1/topk": 11, "saev-2.1/relu": 3, "saev-2.1/btopk": 1}


def no_look() -> None:
    """No reason to stop."""


def make_run(tmp_path, activation=RELU, **settings):
    shards = make_shards(tmp_path / "shards", make_acts(), layers=(2, 4), cls_token=True)
    sae = make_sae(tmp_path / "sae.pt", activation)
    out = tmp_path / "run"
    extract.run(Extract(shards=shards, sae=sae, out=out, layer=4, top_k=9, progress=False, **settings))
    return out


@pytest.mark.parametrize("name", FIXTURES)
def test_every_fixture_run_verifies(tmp_path, name, capsys):
    source = DATA / name
    extract.run(
        Extract(shards=source / "shards", sae=source / "sae.pt", out=tmp_path / "run", layer=FIXTURES[name], progress=False)
    )
    capsys.readouterr()
    verify.run(Verify(run=tmp_path / "run", all=True, progress=False))
    said = capsys.readouterr().out
    values = torch.load(tmp_path / "run/top_values.pt", weights_only=True)
    assert f"{int((values > 0).sum()):,} equal to the stored ones" in said and "verdict             verified: " in said
    n_fired = int((values[:, 0] > 0).sum())
    for n_features, is_part in ((n_fired - 1, True), (n_fired, False)):
        verify.run(Verify(run=tmp_path / "run", n_features=n_features, progress=False))
        assert ("(--all checks those of every feature)" in capsys.readouterr().out) == is_part


@pytest.mark.parametrize("activation", [RELU, TOPK, BATCH_TOPK], ids=lambda activation: activation["cls"])
@pytest.mark.parametrize("rank_by", ["patch", "image"])
def test_an_image_encoded_again_equals_brute_force(tmp_path, activation, rank_by):
    run = FinishedRun.open(make_run(tmp_path, activation, rank_by=rank_by))
    dense = dense_codes(make_acts(), make_weights(), activation)
    slots = choose_slots(range(0, run.sae.d_sae, 3), run.values_sk, run.imgs_sk, run.patches_sk, None)
    slots = slots[np.lexsort((slots["feature"], slots["img_i"]))]
    seen, check = [], Check()
    with Encoder(run.sae, torch.device("cpu"), "fp32", 2) as encoder:
        for image in reencode(run, slots, encoder, check, read_ahead=2, look=no_look):
            np.testing.assert_array_equal(image.values_mp, dense[image.img_i][:, image.feature_m].T)
            seen.append(image.img_i)
    assert seen == np.unique(slots["img_i"]).tolist()
    assert check.n_slots == len(slots) > 0 and check.n_on_edge == 0


@pytest.mark.parametrize("work", [reencode, verify_tokens])
def test_a_signal_is_obeyed_while_the_disk_stalls(tmp_path, monkeypatch, work):
    run = FinishedRun.open(make_run(tmp_path))
    slots = choose_slots((1,), run.values_sk, run.imgs_sk, run.patches_sk, None)
    monkeypatch.setattr(reader, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(reader, "read_batch", lambda *args, **how: time.sleep(0.2))

    def look() -> None:
        raise Preempted("told")

    with Encoder(run.sae, torch.device("cpu"), "fp32", 1) as encoder, pytest.raises(Preempted, match="told"):
        next(iter(work(run, slots[np.argsort(slots["img_i"])], encoder, Check(), read_ahead=2, look=look)))


@pytest.mark.parametrize(("at_once", "most_codes"), [(1024, 2**25), (3, 2**25), (1024, 96)])
@pytest.mark.parametrize("activation", [RELU, TOPK], ids=lambda activation: activation["cls"])
def test_only_the_tokens_that_won_are_encoded_each_once(tmp_path, activation, at_once, most_codes, monkeypatch, capsys):
    out, submit, sizes = make_run(tmp_path, activation), Encoder.submit, []
    monkeypatch.setattr("saev_dist.reencode.TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr("saev_dist.sae.pieces.PIECE_CODES", most_codes)
    monkeypatch.setattr(
        Encoder, "submit", lambda self, acts_td, **how: sizes.append(len(acts_td)) or submit(self, acts_td, **how)
    )
    capsys.readouterr()
    verify.run(Verify(run=out, features=(1, 2, 5), n_features=0, progress=False))
    run, said = FinishedRun.open(out), capsys.readouterr().out
    slots = deal(choose_slots((1, 2, 5), run.values_sk, run.imgs_sk, run.patches_sk, None), 1)[0]
    n_tokens, n_images = len(np.unique(slots[["img_i", "patch_i"]])), len(np.unique(slots["img_i"]))
    assert f"{n_tokens:,} tokens of {n_images:,} images" in said and f"{len(slots):,} equal to the stored ones" in said
    assert sum(sizes) == n_tokens < n_images * run.shards.n_patches
    most = min(at_once, most_codes // (3 if activation is TOPK else run.sae.d_sae))
    assert max(sizes) < most + run.shards.n_patches and (len(sizes) == 1) == (n_tokens < most)
    sizes.clear()
    with Encoder(run.sae, torch.device("cpu"), "fp32", 1) as encoder:
        steps = verify_tokens(run, slots, encoder, Check(), read_ahead=2, look=no_look)
        next(steps)
        assert sum(sizes) < n_tokens, "it can be told of before all are read"
        assert 1 + sum(1 for _ in steps) == n_images and sum(sizes) == n_tokens


def test_a_token_that_is_no_number_any_more_is_named(tmp_path, capsys):
    acts = np.random.default_rng(0).integers(-2, 3, (23, 5, 600)).astype(np.float32)  # more than the 4 KiB that are probed
    shards, sae = make_shards(tmp_path / "shards", acts, imgs_per_shard=23), make_sae(tmp_path / "sae.pt", d_model=600)
    extract.run(Extract(shards=shards, sae=sae, out=tmp_path / "run", rank_by="image", progress=False))
    run = FinishedRun.open(tmp_path / "run")
    feature, slot = np.argwhere((run.patches_sk > 0) & (run.patches_sk < 4))[0]
    img_i, patch_i = int(run.imgs_sk[feature, slot]), int(run.patches_sk[feature, slot])  # the only token of its image
    acts[img_i, patch_i, 7] = acts[img_i, 4, 9] = np.nan
    acts.tofile(shards / "acts000000.bin")
    line = fails(capsys, "verify", "--run", tmp_path / "run", "--features", feature, "--n-features", 0)
    assert f"acts000000.bin: image {img_i} (example {img_i} of the shard), patch {patch_i}, dimension 7 is nan" in line
    assert "(2 of the batch's 5 tokens are not)" in line


def test_ranks_check_the_same_scores(tmp_path):
    out = make_run(tmp_path)
    tables = [run_ranks("verify", "--run-dir", out, "--all", n_ranks=n_ranks) for n_ranks in (1, 3)]
    assert [done.returncode for done in tables] == [0, 0], tables
    one, three = ([line for line in done.stdout.splitlines() if line.startswith(("scores", "encoded"))] for done in tables)
    assert one == three and len(one) == 2


@pytest.mark.parametrize("tolerances", [-3, 3])
@pytest.mark.parametrize("activation", [RELU, TOPK, BATCH_TOPK], ids=lambda activation: activation["cls"])
def test_a_score_altered_by_more_than_the_tolerance_is_found_and_named(tmp_path, monkeypatch, capsys, activation, tolerances):
    monkeypatch.setattr("saev_dist.reencode._is_on_edge", lambda *_: True)  # to be asked only of what a code lacks
    out = make_run(tmp_path, activation)
    values = torch.load(out / "top_values.pt", weights_only=True)
    places = [torch.load(out / f"top_{name}.pt", weights_only=True) for name in ("img_i", "patch_i")]
    feature = int((values > 0).sum(dim=1).argmax())
    img_i, patch_i = (int(place[feature, 2]) for place in places)
    w = make_weights()
    terms = np.abs(make_acts()[img_i, patch_i]) @ w["w_enc_ds"][:, feature].abs().numpy() + float(w["b_enc_s"][feature].abs())
    stored = float(values[feature, 2])
    values[feature, 2] += tolerances * TOLERANCE["fp32"] * float(terms)
    torch.save(values, out / "top_values.pt")
    line = fails(capsys, "verify", "--run", out, "--features", feature, "--n-features", 0)
    assert f"feature {feature}, slot 2 (image {img_i}, patch {patch_i}) is stored as {values[feature, 2]:.7g}" in line
    assert f"encoded again it is {stored:.7g}" in line


ORDER = "scores are in descending order, ties in that of images and patches"
COUNT = "a feature has as many slots as it fired, up to top_k"
EXIST = "names an image or a patch that the shards do not have"


def emptied(row):
    return [(-np.inf, -1, -1)] * len(row)


@pytest.mark.parametrize("rank_by", ["patch", "image"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (emptied, COUNT),
        (lambda row: [row[1], row[0], *row[2:]], ORDER),
        (lambda row: [*row[1:], (-np.inf, -1, -1)], COUNT),
        (lambda row: [row[0], row[0], *row[2:]], ORDER),
        (lambda row: [(row[0][0], row[0][1], row[0][2] - 100), *row[1:]], EXIST),
        (lambda row: [(row[0][0], 10**9, row[0][2]), *row[1:]], EXIST),
        (lambda row: [(row[0][0], -1, row[0][2]), *row[1:]], "filled slots come first"),
        (lambda row: [(np.inf, *row[0][1:]), *row[1:]], "filled slots have finite scores above zero"),
        (lambda row: [*row[:-1], (row[-1][0], -1, -1)], "empty slots hold -inf and -1"),
    ],
    ids=["emptied", "swapped", "one lost", "one twice", "patch below zero", "no such image", "a gap", "infinite", "half empty"],
)
def test_slots_that_no_extract_writes_are_refused(tmp_path, capsys, rank_by, damage, said):
    out = make_run(tmp_path, rank_by=rank_by)
    stored = {name: torch.load(out / f"top_{name}.pt", weights_only=True) for name in ("values", "img_i", "patch_i")}
    n_fired = (torch.load(out / "sparsity.pt", weights_only=True) * make_acts()[..., 0].size).round()
    feature, other = (n_fired > 9).nonzero()[:2, 0].tolist()
    row = list(zip(*(stored[name][feature].tolist() for name in stored), strict=True))
    for name, column in zip(stored, zip(*damage(row), strict=True), strict=True):
        stored[name][feature] = torch.tensor(column).to(stored[name].dtype)
        torch.save(stored[name], out / f"top_{name}.pt")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["artifacts"]  # their sizes, which say it too where one of them has changed
    (out / "manifest.json").write_text(json.dumps(manifest))
    lone = ["--features", other, "--n-features", 0, "--no-progress"]
    if (rank_by, said) == ("image", COUNT) and damage is not emptied:  # of images nobody has counted how many there were
        return verify.run(Verify(run=out, features=(other,), n_features=0, progress=False))
    for command in (["verify", "--run", out, *lone], ["replay", "--run", out, *lone]):
        assert said in fails(capsys, *command)
    assert ("images and patches exist" if said == EXIST else said) in fails(capsys, "inspect", out)


def test_artifacts_of_another_type_or_size_are_refused(tmp_path, capsys):
    out = make_run(tmp_path)
    images = torch.load(out / "top_img_i.pt", weights_only=True)
    torch.save(images.half(), out / "top_img_i.pt")
    assert "top_img_i.pt holds torch.float16 (24, 9)" in fails(capsys, "verify", "--run", out)
    torch.save(images, out / "top_img_i.pt")
    histograms = torch.load(out / "histograms.pt", weights_only=True)
    torch.save(histograms | {"counts": histograms["counts"][1:]}, out / "histograms.pt")
    assert "histograms.pt holds counts (23, 514) and edges (515,)" in fails(capsys, "verify", "--run", out)


def test_a_swapped_sae_and_swapped_shards_are_refused_by_their_fingerprints(tmp_path, capsys):
    out = make_run(tmp_path)
    other_sae = make_sae(tmp_path / "other.pt", TOPK)
    assert "is not what" in fails(capsys, "verify", "--run", out, "--sae", other_sae)
    other_shards = make_shards(tmp_path / "other", make_acts(seed=5), layers=(2, 4), cls_token=True)
    assert "is not what" in fails(capsys, "verify", "--run", out, "--shards", other_shards)
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    assert "say with --shards where it is now" in fails(capsys, "verify", "--run", out)
    verify.run(Verify(run=out, shards=tmp_path / "moved", progress=False))


def test_content_that_changed_behind_the_fingerprint_is_found(tmp_path, capsys):
    """The fingerprint looks at the first bytes of a shard; the scores look at all that won."""
    acts = np.random.default_rng(0).integers(-2, 3, (23, 5, 600)).astype(np.float32)  # more than the 4 KiB that are probed
    shards = make_shards(tmp_path / "shards", acts, layers=(4,), imgs_per_shard=23)
    sae = make_sae(tmp_path / "sae.pt", d_model=600)
    extract.run(Extract(shards=shards, sae=sae, out=tmp_path / "run", progress=False))
    fpath = shards / "acts000000.bin"
    stored = np.fromfile(fpath, np.float32)
    stored[2000:] = stored[2000:][::-1]
    stored.tofile(fpath)
    line = fails(capsys, "verify", "--run", tmp_path / "run", "--all")
    assert "is stored as" in line and "the shards' content changed since" in line


def test_a_swapped_layer_is_found(tmp_path, capsys):
    out = make_run(tmp_path)
    manifest = (out / "manifest.json").read_text()
    assert '"layer": 4' in manifest
    (out / "manifest.json").write_text(manifest.replace('"layer": 4', '"layer": 2'))
    assert "is not what" in fails(capsys, "verify", "--run", out)


def test_what_is_no_finished_run_is_refused(tmp_path, capsys):
    assert "is not a run" in fails(capsys, "verify", "--run", tmp_path / "nothing")
    (tmp_path / "half/partials").mkdir(parents=True)
    assert "unfinished run" in fails(capsys, "verify", "--run", tmp_path / "half")
    out = make_run(tmp_path)
    (out / "top_patch_i.pt").write_bytes(b"")
    assert "is damaged" in fails(capsys, "verify", "--run", out)


def other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that add their terms in another order, as another device does."""
    addmm = torch.addmm
    flipped = lambda b_s, x_bd, w_ds, out: addmm(b_s, x_bd.flip(1), w_ds.flip(0), out=out)  # noqa: E731
    monkeypatch.setattr(torch, "addmm", flipped)
    monkeypatch.setattr(product, "numpy_is_faster", lambda: False)


def twins() -> tuple[torch.Tensor, np.ndarray]:
    """An encoder whose features come in pairs that all but tie, and activations."""
    w_enc = torch.randn(48, 512, generator=torch.Generator().manual_seed(0))
    w_enc[:, 256:] = w_enc[:, :256]
    w_enc[0, 256:] += 1e-7
    return w_enc, np.random.default_rng(1).normal(size=(60, 7, 48)).astype(np.float32)


def between(w_enc: torch.Tensor, acts: np.ndarray) -> float:
    """A threshold that one score exceeds on another device and reaches on this one, above nearly all others."""
    x_bd = torch.from_numpy(acts).flatten(0, 1)
    here_bs, there_bs = x_bd @ w_enc, x_bd.flip(1) @ w_enc.flip(0)
    return float(here_bs[there_bs > here_bs].topk(10).values[-1])


def test_terms_are_added_up_a_few_slots_at_a_time_and_only_where_a_difference_may_be_the_largest(tmp_path, monkeypatch):
    (w_enc, acts), magnitude, checks = twins(), Encoder.magnitude, {}
    save_saev(tmp_path / "sae.pt", w_enc, torch.zeros(512), w_enc.T, torch.zeros(48), RELU)
    shards = make_shards(tmp_path / "shards", acts, imgs_per_shard=40)
    with monkeypatch.context() as there:
        other_device(there)
        extract.run(Extract(shards=shards, sae=tmp_path / "sae.pt", out=tmp_path / "run", device="cpu", progress=False))
    run, sizes = FinishedRun.open(tmp_path / "run"), {4096: [], 2: []}
    slots = deal(choose_slots(range(512), run.values_sk, run.imgs_sk, run.patches_sk, None), 1)[0]
    for at_once in (4096, 2):
        checks[at_once] = Check()

        def note(self, acts_nd, feature_n, to=sizes[at_once]):
            to.append(len(feature_n))
            return magnitude(self, acts_nd, feature_n)

        with monkeypatch.context() as patch, Encoder(run.sae, torch.device("cpu"), "fp32", 1) as encoder:
            patch.setattr(Encoder, "magnitude", note)
            patch.setattr("saev_dist.reencode.SLOTS_AT_ONCE", at_once)
            images = list(reencode(run, slots, encoder, checks[at_once], read_ahead=2, look=no_look))
    shares = []
    for image in images:
        found_n = image.values_mp[np.searchsorted(image.feature_m, image.slots_n["feature"]), image.slots_n["patch_i"]]
        acts_nd = torch.from_numpy(acts[image.img_i, image.slots_n["patch_i"]])
        terms_n = encoder.magnitude(acts_nd, torch.from_numpy(image.slots_n["feature"].copy())).numpy()
        shares.extend(np.abs(found_n - image.slots_n["score"]) / (TOLERANCE["fp32"] * terms_n))
    assert checks[4096].largest == checks[2].largest == max(shares) > 0
    assert max(sizes[2]) == 2 and sum(sizes[2]) == sum(sizes[4096]) < len(slots) / 4


@pytest.mark.parametrize("cls", ["TopK", "BatchTopK"])
def test_a_run_of_another_device_verifies_where_rounding_decides_what_a_code_keeps(tmp_path, monkeypatch, capsys, cls):
    w_enc, acts = twins()
    params = {"top_k": 5} | ({"threshold": between(w_enc, acts)} if cls == "BatchTopK" else {})
    save_saev(tmp_path / "sae.pt", w_enc, torch.zeros(512), w_enc.T, torch.zeros(48), {"cls": cls, "params": params})
    shards = make_shards(tmp_path / "shards", acts, imgs_per_shard=40)
    with monkeypatch.context() as there:
        other_device(there)
        extract.run(Extract(shards=shards, sae=tmp_path / "sae.pt", out=tmp_path / "run", device="cpu", progress=False))
    monkeypatch.setattr(product, "numpy_is_faster", lambda: False)  # whose rounding `between` knows
    run = FinishedRun.open(tmp_path / "run")
    slots = deal(choose_slots(range(512), run.values_sk, run.imgs_sk, run.patches_sk, None), 1)[0]
    check = Check()
    with Encoder(run.sae, torch.device("cpu"), "fp32", 1) as encoder:
        for image in reencode(run, slots, encoder, check, read_ahead=2, look=no_look):
            row_n = np.searchsorted(image.feature_m, image.slots_n["feature"])
            drawn_n = image.values_mp[row_n, image.slots_n["patch_i"]]
            np.testing.assert_allclose(drawn_n, image.slots_n["score"], rtol=1e-4)  # also those on the edge
    assert check.n_slots == len(slots) and check.n_on_edge > 0 and 0 < check.largest <= 1
    verify.run(Verify(run=tmp_path / "run", all=True, device="cpu", progress=False))
    told = re.search(r"([\d,]+) equal to the stored ones, ([1-9]\d*) more are on the edge", capsys.readouterr().out)
    assert sum(int(number.replace(",", "")) for number in told.groups()) == len(slots)


def test_where_there_are_no_slots_there_is_no_step(tmp_path):
    run = FinishedRun.open(make_run(tmp_path))
    slots = choose_slots((), run.values_sk, run.imgs_sk, run.patches_sk, None)
    with Encoder(run.sae, torch.device("cpu"), "fp32", 1) as encoder:
        assert not list(verify_tokens(run, slots, encoder, Check(), read_ahead=2, look=no_look))


def test_nothing_is_not_verified(tmp_path, capsys):
    out = make_run(tmp_path)
    dead = int((torch.load(out / "sparsity.pt", weights_only=True) == 0).nonzero()[0])
    verify.run(Verify(run=out, features=(dead,), n_features=0, progress=False))
    assert "verdict             nothing to verify: none of these features ever fired" in capsys.readouterr().out


def test_a_score_that_its_code_leaves_out_by_more_than_rounding_is_found(tmp_path, capsys):
    out = make_run(tmp_path, TOPK)
    h = make_acts() @ make_weights()["w_enc_ds"].numpy() + make_weights()["b_enc_s"].numpy()
    fourth = np.sort(h, axis=-1)[..., -4:-3]
    img_i, patch_i, feature = np.argwhere((h > 0) & (h < fourth))[0].tolist()  # above zero, and left out by a whole number
    stored = {name: torch.load(out / f"top_{name}.pt", weights_only=True) for name in ("values", "img_i", "patch_i")}
    for name, value in (("values", float(h[img_i, patch_i, feature])), ("img_i", img_i), ("patch_i", patch_i)):
        stored[name][feature, 0] = value
        torch.save(stored[name], out / f"top_{name}.pt")
    line = fails(capsys, "verify", "--run", out, "--features", feature, "--n-features", 0)
    assert f"feature {feature}, slot 0 (image {img_i}, patch {patch_i})" in line and "encoded again it is 0," in line


SLOT = [("feature", int), ("patch_i", int), ("img_i", int), ("score", float)]


@pytest.mark.parametrize(
    ("precision", "ahead", "off", "on_edge"),
    [
        ("fp32", 2.0**-10, 0, True),
        ("fp32", 0.5, 0, False),
        ("fp32", 2.0**-10, 3, False),
        ("fp32", 2.0**-10, -3, False),
        ("bf16", 31, 0, True),  # lifted by 256, where numbers of bf16 are 2 apart
        ("bf16", 1023, 0, False),
    ],
)
@pytest.mark.parametrize(("at_once", "cls"), [(4096, TopK), (1, TopK), (4096, GroupMax)])
def test_the_score_that_wins_by_rounding_may_be_the_larger_sum(monkeypatch, precision, ahead, off, on_edge, at_once, cls):
    """Feature 0 is exactly 1, stored `off` tolerances too high; feature 1, of terms of thousands, is ahead by less than they
    round, or by more."""
    magnitude, sizes = Encoder.magnitude, []
    monkeypatch.setattr("saev_dist.reencode.SLOTS_AT_ONCE", at_once)
    monkeypatch.setattr(Encoder, "magnitude", lambda *args: sizes.append(len(args[2])) or magnitude(*args))
    w_enc = torch.tensor([[1.0, 8192.0], [0.0, 8191.0 - ahead]])
    sae = Sae(
        w_enc_ds=w_enc, b_enc_s=torch.zeros(2), w_dec_sd=w_enc.T.contiguous(), b_dec_d=torch.zeros(2), activation=cls(1),
        pre_bias=False, source="",
    )  # fmt: skip
    acts_pd = torch.tensor([[1.0, -1.0]])
    tolerance = TOLERANCE[precision]
    slot = np.array([(0, 0, 0, 1 + off * tolerance)], SLOT)[0]
    with Encoder(sae, torch.device("cpu"), precision, 1) as encoder:
        assert encoder.encode(acts_pd, img_i=0, n_patches=1).feature_n.tolist() == [1]
        assert _is_on_edge(encoder, acts_pd, slot, tolerance * 1.0, tolerance) == on_edge
    assert sizes == ([2] if at_once == 4096 else [1, 1])  # not the weights of all features at once


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("activation", "bias", "score"),
    [(Threshold(1.0), 1.0, 1.0), (Threshold(torch.tensor([0.5, 1.0])), 1.0, 1.0), (Gated(torch.full((2,), 3.0), torch.tensor([0.0, 5.0])), 0.0, 5.0)],
    ids=["threshold", "thresholds", "gated"],
)  # fmt: skip
def test_what_reaches_a_bound_up_to_rounding_must_still_equal_the_stored_score(precision, activation, bias, score):
    """Feature 1 has its threshold's score, which does not exceed it, or a gate of exactly 0."""
    w_enc, acts_1d = torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.ones(1, 2)
    sae = Sae(
        w_enc_ds=w_enc, b_enc_s=torch.tensor([0.0, bias]), w_dec_sd=w_enc.T.contiguous(), b_dec_d=torch.zeros(2),
        activation=activation, pre_bias=False, source="",
    )  # fmt: skip
    with Encoder(sae, torch.device("cpu"), precision, 1) as encoder:
        assert 1 not in encoder.encode(acts_1d, img_i=0, n_patches=1).feature_n
        allowed = TOLERANCE[precision] * float(encoder.magnitude(acts_1d, torch.tensor([1])))
        for off, on_edge in {-3: False, -0.75: True, 0: True, 0.75: True, 3: False}.items():
            slot = np.array([(1, 0, 0, score + off * allowed)], SLOT)[0]
            assert _is_on_edge(encoder, acts_1d, slot, allowed, TOLERANCE[precision]) == on_edge, off
