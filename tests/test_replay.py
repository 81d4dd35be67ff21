"""Replay: pictures equal brute force, the same files on any number of ranks, resumed after a kill, and its bad input."""

import csv
import hashlib
import json
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from saev_dist import draw, extract, replay
from saev_dist.config import Extract, Replay
from saev_dist.errors import RunError
from saev_dist.render.geometry import Geometry
from saev_dist.render.heatmap import highlight
from tests.ranks import run_cli
from tests.synthetic import BATCH_TOPK, RELU, TOPK, dense_codes, make_acts, make_sae, make_shards, make_weights
from tests.test_verify import fails

N_IMGS, N_PATCHES = 23, 6


def make_pictures(dpath: Path, n: int = N_IMGS, size: tuple[int, int] = (60, 40)) -> Path:
    """Class folders of noise: every picture differs from every other in every pixel's neighbourhood."""
    for i in range(n):
        fpath = dpath / f"class{i * 3 // n}" / f"{i:03d}.png"
        fpath.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).save(fpath)
    return dpath


def make_run(tmp_path: Path, activation: dict = RELU, **settings) -> Path:
    acts = make_acts(N_IMGS, N_PATCHES)
    shards = make_shards(tmp_path / "shards", acts, layers=(2, 4), cls_token=True)
    sae = make_sae(tmp_path / "sae.pt", activation)
    out = tmp_path / "run"
    extract.run(Extract(shards=shards, sae=sae, out=out, layer=4, top_k=9, progress=False, **settings))
    return out


def make_replay(run: Path, **settings) -> Replay:
    return Replay(**{"run": run, "progress": False, "image_format": "png", "workers": 1, "all": True, "n_images": 3} | settings)


def tree(dpath: Path) -> dict[str, str]:
    """SHA-256 of every file below."""
    return {
        str(fpath.relative_to(dpath)): hashlib.sha256(fpath.read_bytes()).hexdigest()
        for fpath in sorted(dpath.rglob("*"))
        if fpath.is_file()
    }


@pytest.mark.parametrize("activation", [RELU, TOPK, BATCH_TOPK], ids=lambda activation: activation["cls"])
@pytest.mark.parametrize("rank_by", ["patch", "image"])
def test_pictures_equal_brute_force(tmp_path, activation, rank_by):
    run, images = make_run(tmp_path, activation, rank_by=rank_by), make_pictures(tmp_path / "images")
    replay.run(make_replay(run, images=images, patch_size=5))
    dense = dense_codes(make_acts(N_IMGS, N_PATCHES), make_weights(), activation)
    fpaths = sorted(images.rglob("*.png"))
    place = Geometry(fit="grid", n_patches=N_PATCHES, patch_size=5).place(60, 40)
    assert (place.n_cols, place.n_rows) == (3, 2)  # not square, so a transposed grid would fail
    n_drawn = 0
    for feature in range(dense.shape[2]):
        best = dense[:, :, feature].max(axis=1)
        strongest = sorted((img for img in range(N_IMGS) if best[img] > 0), key=lambda img: (-best[img], img))
        if rank_by == "patch":  # nine slots may hold fewer images: those of the nine strongest patches
            ranked = sorted(
                (-dense[e, p, feature], e, p) for e in range(N_IMGS) for p in range(N_PATCHES) if dense[e, p, feature] > 0
            )
            strongest = list(dict.fromkeys(e for _, e, _ in ranked[:9]))
        for order, img in enumerate(strongest[:3]):
            picture = Image.open(fpaths[img]).resize(place.resize, Image.Resampling.LANCZOS)
            expected = highlight(np.asarray(picture), dense[img, :, feature], best.max(), place)
            folder = run / "visuals/features" / str(feature)
            assert (np.asarray(Image.open(folder / f"{order:03d}-{img}.png")) == np.asarray(picture)).all()
            assert (np.asarray(Image.open(folder / f"{order:03d}-{img}-heatmap.png")) == expected).all()
            n_drawn += 1
    heatmaps = list((run / "visuals/features").rglob("*-heatmap.png"))
    assert len(heatmaps) == n_drawn > 10


def test_three_ranks_write_the_files_of_one(tmp_path):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    trees = []
    for n_ranks in (1, 3):
        done = run_cli(
            "replay", "--run-dir", run, "--images", images, "--n-features", 9, "--n-images", 4, "--force", n_ranks=n_ranks
        )
        assert done.returncode == 0, done.stderr
        trees.append(tree(run / "visuals"))
        assert not (run / "visuals.partial").exists()
    assert trees[0] == trees[1]
    names = {Path(name).name for name in trees[0]}
    assert {
        "index.html",
        "data.js",
        "features.parquet",
        "features.csv",
        "images.parquet",
        "density.png",
        "distributions.png",
    } <= names


def test_a_replay_that_died_draws_only_what_is_missing(tmp_path, monkeypatch):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images)
    replay.run(cfg)
    whole = tree(run / "visuals")
    n_pictures = sum(name.endswith("-heatmap.png") for name in whole)

    drawn: list[int] = []
    make_records = replay._make_records

    def die_half_way(job, image, place):
        if len(drawn) >= 6:
            raise RunError("killed")
        drawn.append(len(image.feature_m))
        return make_records(job, image, place)

    monkeypatch.setattr(replay, "_make_records", die_half_way)
    with pytest.raises(RunError, match="killed"):
        replay.run(make_replay(run, images=images, force=True))
    assert tree(run / "visuals") == whole  # the former gallery stays until the new one is whole
    records = next((run / "visuals.partial").glob("records.*.bin"))
    records.write_bytes(records.read_bytes() + b"torn")  # a write that a kill cut off

    monkeypatch.undo()
    said: list[dict] = []
    summary = replay._summary
    monkeypatch.setattr(replay, "_summary", lambda job, reports: said.extend(reports) or summary(job, reports))
    (run / "visuals/replay.json").unlink()
    replay.run(cfg)
    assert tree(run / "visuals") == whole
    assert 0 < sum(drawn) < n_pictures and said[0]["n_pictures"] == n_pictures - sum(drawn)


def test_a_finished_gallery_is_left_as_it_is_and_another_takes_its_place(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    replay.run(make_replay(run, images=images))
    before = (run / "visuals/index.html").stat().st_mtime_ns
    replay.run(make_replay(run, images=images))
    assert "finished" in capsys.readouterr().out and (run / "visuals/index.html").stat().st_mtime_ns == before
    replay.run(make_replay(run, images=images, all=False, features=(3,), n_features=0))
    assert [dpath.name for dpath in (run / "visuals/features").iterdir()] == ["3"]
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("visuals")) == ["visuals"]


def test_a_feature_that_never_fired_has_no_pictures(tmp_path):
    run = make_run(tmp_path)
    dead = int((torch.load(run / "sparsity.pt", weights_only=True) == 0).nonzero()[0])
    replay.run(make_replay(run, all=False, features=(dead,), n_features=0))
    assert [path.name for path in (run / f"visuals/features/{dead}").iterdir()] == ["data.js"]
    lines = (run / "visuals/features.csv").read_text().splitlines()
    rows = {int(row["feature"]): row for row in csv.DictReader(lines)}
    assert len(rows) == make_weights()["w_enc_ds"].shape[1] and int(rows[dead]["n_active"]) == 0


def test_without_pictures_heatmaps_lie_on_a_plain_ground(tmp_path, capsys):
    run = make_run(tmp_path)
    replay.run(make_replay(run, grid=(2, 3)))
    assert "plain ground" in capsys.readouterr().out
    heatmaps = [np.asarray(Image.open(fpath)) for fpath in (run / "visuals/features").rglob("*-heatmap.png")]
    assert {heatmap.shape for heatmap in heatmaps} == {(48, 32, 3)}
    assert max(len(np.unique(heatmap.reshape(-1, 3), axis=0)) for heatmap in heatmaps) > 2


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def spoil(images: Path, how: str) -> None:
    fpath = min(images.rglob("*.png"))
    match how:
        case "truncated":
            fpath.write_bytes(fpath.read_bytes()[:-500])
        case "text":
            fpath.write_text("this is no picture")
        case "bomb":
            fpath.write_bytes(png_header(60_000, 60_000))
        case "one missing":
            fpath.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", ["000.png cannot be read", "truncated"]),
        ("text", ["000.png is not a picture"]),
        ("bomb", ["000.png would decode to more than"]),
        ("one missing", ["found 22 (class folders) pictures", "have 23 examples"]),
    ],
)
def test_bad_pictures_stop_the_run_with_one_line(tmp_path, capsys, how, words):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    spoil(images, how)
    line = fails(capsys, "replay", "--run", run, "--images", images, "--all", "--n-images", 99, "--workers", 1, "--no-progress")
    for word in words:
        assert word in line
    assert not (run / "visuals").exists()


def test_bad_requests_are_refused(tmp_path, capsys):
    run = make_run(tmp_path)
    assert "no such feature" in fails(capsys, "replay", "--run", run, "--features", 24)
    assert "Widen --log-freq-range" in fails(capsys, "replay", "--run", run, "--log-freq-range", -9, -8)
    assert "found nothing" in fails(capsys, "replay", "--run", run, "--images", tmp_path / "gone")
    assert "has 8 patches; the shards have 6" in fails(capsys, "replay", "--run", run, "--grid", 2, 4)
    assert "is not a run" in fails(capsys, "replay", "--run", tmp_path)


def test_an_altered_score_stops_the_replay(tmp_path, capsys):
    run = make_run(tmp_path)
    values = torch.load(run / "top_values.pt", weights_only=True)
    values[3, 0] += 0.25
    torch.save(values, run / "top_values.pt")
    line = fails(capsys, "replay", "--run", run, "--all", "--no-progress")
    assert "feature 3, slot 0" in line and not (run / "visuals").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "visuals.partial").write_text("in the way")
    assert "visuals.partial" in fails(capsys, "replay", "--run", run, "--all", "--no-progress")


def test_flat_folders_and_data_sets_are_picture_sources(tmp_path):
    datasets = pytest.importorskip("datasets")
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    fpaths = sorted(images.rglob("*.png"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for fpath in fpaths:
        (flat / fpath.name).write_bytes(fpath.read_bytes())
    rows = {"image": [str(fpath) for fpath in fpaths], "label": [int(fpath.parent.name[-1]) for fpath in fpaths]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    found = []
    for source in (images, flat, tmp_path / "set"):
        replay.run(make_replay(run, images=source, all=False, n_features=4))
        found.append({name: digest for name, digest in tree(run / "visuals").items() if name.endswith(".png") and "/" in name})
        labels = pyarrow.parquet.read_table(run / "visuals/images.parquet").column("label").to_pylist()
        expected = {images: [fpath.parent.name for fpath in fpaths], flat: [""] * N_IMGS}
        assert labels == expected.get(source, ["abc"[label] for label in rows["label"]])
    assert found[0] == found[1] == found[2] and found[0]


def test_drawing_processes_leave_when_their_parent_is_killed(tmp_path):
    script = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from saev_dist.draw import start
if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=start, initargs=(None,))
    import os
    print(*{pool.submit(os.getpid).result() for _ in range(9)}, flush=True)
    time.sleep(60)
"""
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert pids
        parent.kill()
    until = time.monotonic() + 10
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def test_drawing_processes_import_no_torch():
    code = "import sys, saev_dist.draw; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert draw.file_names(3, 17, "webp") == ("003-17.webp", "003-17-heatmap.webp")


def test_the_gallery_remembers_what_it_was_made_of(tmp_path):
    run = make_run(tmp_path)
    replay.run(make_replay(run, all=False, n_features=5, seed=3))
    identity = json.loads((run / "visuals/replay.json").read_text())
    assert len(identity["features"]) == 5 and identity["geometry"]["fit"] == "grid"
