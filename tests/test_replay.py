"""Replay: pictures equal brute force, the same files on any number of ranks, and its bad input."""

import csv
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saev_dist import draw, extract, replay, replay_report, report
from saev_dist.choose import SLOT
from saev_dist.cli import parse
from saev_dist.config import Extract
from saev_dist.errors import RunError
from saev_dist.render.geometry import Geometry
from saev_dist.render.heatmap import highlight
from saev_dist.render.plots import plasma
from saev_dist.sae.saev import save_saev
from tests import fates
from tests.crash import wait_for
from tests.ranks import fails, run_ranks
from tests.replays import N_IMGS, N_PATCHES, make_pictures, make_replay, make_run, tree
from tests.synthetic import BATCH_TOPK, RELU, TOPK, dense_codes, make_acts, make_shards, make_weights


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
            expected = highlight(np.asarray(picture), dense[img, :, feature], best.max(), place, plasma())
            folder = run / "visuals/features" / str(feature)
            assert (np.asarray(Image.open(folder / f"{order:03d}-{img}.png")) == np.asarray(picture)).all()
            assert (np.asarray(Image.open(folder / f"{order:03d}-{img}-heatmap.png")) == expected).all()
            n_drawn += 1
    heatmaps = list((run / "visuals/features").rglob("*-heatmap.png"))
    assert len(heatmaps) == n_drawn > 10


def test_a_picture_that_keeps_its_aspect_is_cut_out_of_the_middle_and_is_another_gallery(tmp_path):
    """As torchvision's Resize(12) and CenterCrop((8, 12)) cut it."""
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    shape = {
        "fit": "crop",
        "resize": (12, 12),
        "crop": (12, 8),
        "patch_size": 4,
        "images": images,
        "all": False,
        "n_features": 2,
    }
    identities = []
    for keep_aspect, resize, (left, top) in ((True, (18, 12), (3, 2)), (False, (12, 12), (0, 2))):
        replay.run(make_replay(run, **shape, keep_aspect=keep_aspect))
        fpaths = [fpath for fpath in (run / "visuals/features").rglob("*.png") if "heatmap" not in fpath.name]
        assert len(fpaths) > 2
        for fpath in fpaths:
            img_i = int(fpath.stem.split("-")[1])
            picture = Image.open(sorted(images.rglob("*.png"))[img_i]).resize(resize, Image.Resampling.LANCZOS)
            assert (np.asarray(Image.open(fpath)) == np.asarray(picture)[top : top + 8, left : left + 12]).all()
        identities.append(json.loads((run / "visuals/replay.json").read_text()))
        told = (run / "visuals/data.js").read_text(), (run / "visuals/index.html").read_text()
        assert ["--keep-aspect" in told[0], "on the shorter side, its aspect kept" in told[1]] == [keep_aspect] * 2
    assert identities[0] != identities[1]


def test_three_ranks_write_the_files_of_one(tmp_path):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    trees = []
    for n_ranks in (1, 3):
        done = run_ranks(
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


def test_heatmaps_on_a_plain_ground_lose_nothing(tmp_path):
    run, pixels = make_run(tmp_path), []
    for image_format in ("webp", "png"):
        replay.run(make_replay(run, all=False, n_features=2, image_format=image_format))
        fpaths = sorted((run / "visuals/features").rglob(f"*-heatmap.{image_format}"))
        pixels.append([np.asarray(Image.open(fpath).convert("RGB")) for fpath in fpaths])
    assert len(pixels[0]) > 2 and all(np.array_equal(*pair) for pair in zip(*pixels, strict=True))


def test_the_page_knows_the_command_that_draws_it(tmp_path):
    run = make_run(tmp_path)
    cfg = make_replay(run, all=False, features=(5, 3), n_features=2, seed=1, log_freq_range=(-5.0, 0.5))
    replay.run(cfg)
    content = json.loads((run / "visuals/data.js").read_text().removeprefix("window.gallery = ").removesuffix(";\n"))
    assert content["features"] == [3, 5]
    again = parse(["replay", "--run", str(run), *shlex.split(content["flags"]), "--features", "3", "5"])
    assert again == replace(cfg, features=(3, 5), workers=None, progress=True)


@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_a_picture_that_is_not_on_record_once_stops_the_replay(tmp_path, monkeypatch, fault):
    """A file system that not all ranks share, or another replay in the same directory."""
    run = make_run(tmp_path)
    write = replay.write_features

    def spoiled(job, *rest):
        fpath = job.records.fpaths()[0]
        rows = np.fromfile(fpath, job.records.dtype)
        (rows[1:] if fault == "lost" else np.append(rows, rows[:1])).tofile(fpath)
        write(job, *rest)

    monkeypatch.setattr(replay, "write_features", spoiled)
    with pytest.raises(RunError, match=r"records \d+ pictures of feature \d+; it has \d+. Do all ranks see this directory"):
        replay.run(make_replay(run))
    assert not (run / "visuals").exists()


def test_ranks_that_see_other_pictures_refuse(tmp_path, monkeypatch):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    # What rank 0 of another node says, where the data set is not mounted.
    monkeypatch.setattr(replay.World, "tell", lambda world, word: word | {"images": None} if isinstance(word, dict) else word)
    with pytest.raises(RunError, match=r"rank 0: images is .*class folders.* here, null there"):
        replay.run(make_replay(run, images=images, patch_size=5))
    assert not (run / "visuals.partial").exists()


def test_there_are_no_more_drawing_processes_than_cores_for_them(tmp_path, monkeypatch):
    pools: list[int] = []
    pool = replay.ProcessPoolExecutor
    monkeypatch.setattr(replay, "ProcessPoolExecutor", lambda n, **settings: pools.append(n) or pool(n, **settings))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)  # of the node; one is ours
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    replay.run(make_replay(make_run(tmp_path), workers=None, all=False, n_features=1))
    assert pools == [1]


def test_a_feature_that_never_fired_has_no_pictures(tmp_path, capsys):
    run = make_run(tmp_path)
    dead = int((torch.load(run / "sparsity.pt", weights_only=True) == 0).nonzero()[0])
    replay.run(make_replay(run, all=False, features=(dead,), n_features=0))
    assert f"never fired  {dead}: nothing to draw\n" in capsys.readouterr().out
    assert [path.name for path in (run / f"visuals/features/{dead}").iterdir()] == ["data.js"]
    lines = (run / "visuals/features.csv").read_text().splitlines()
    rows = {int(row["feature"]): row for row in csv.DictReader(lines)}
    assert len(rows) == make_weights()["w_enc_ds"].shape[1] and int(rows[dead]["n_active"]) == 0


def test_without_pictures_heatmaps_lie_on_a_plain_ground(tmp_path, capsys):
    run = make_run(tmp_path)
    replay.run(make_replay(run, grid=(2, 3)))
    assert "none found (name them with --images): heatmaps on a plain ground" in capsys.readouterr().out
    heatmaps = [np.asarray(Image.open(fpath)) for fpath in (run / "visuals/features").rglob("*-heatmap.png")]
    assert {heatmap.shape for heatmap in heatmaps} == {(48, 32, 3)}
    assert max(len(np.unique(heatmap.reshape(-1, 3), axis=0)) for heatmap in heatmaps) > 2


def test_a_run_in_which_nothing_fired_is_refused_by_name(tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", make_acts(N_IMGS, N_PATCHES))
    weights = make_weights()
    weights["b_enc_s"][:] = -1000
    save_saev(tmp_path / "sae.pt", **weights, activation=RELU)
    run = tmp_path / "run"
    extract.run(Extract(shards=shards, sae=tmp_path / "sae.pt", out=run, progress=False))
    capsys.readouterr()
    for command in (["replay"], ["replay", "--all"], ["verify"], ["verify", "--all"]):
        assert "no feature of this run ever fired" in fails(capsys, *command, "--run", run)
    replay.run(make_replay(run, all=False, features=(3,)))  # a named feature is shown: as one that never fires
    assert (run / "visuals/features/3/data.js").exists()


@pytest.mark.parametrize("settings", [{}, {"image_format": "webp"}, {"pictures": False}, {"img_scale": 30.0}], ids=str)
def test_a_dry_run_says_what_would_be_drawn_and_writes_nothing(tmp_path, capsys, monkeypatch, settings):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(
        run, **{"features": (3,), "seed": 1} | ({"images": images} if "pictures" not in settings else {}) | settings
    )
    before = tree(tmp_path)
    replay.run(replace(cfg, dry_run=True))
    text = capsys.readouterr().out
    assert tree(tmp_path) == before and text.endswith("dry run: nothing was encoded or written.\n")
    stated, n_files = re.search(r"^disk +about ([\d.]+ .B) in (\d+) files; ", text, re.M).groups()
    if "img_scale" in settings:  # takes too long to draw: 900 times as many pixels, in fewer than a million bytes
        assert stated.endswith(" MB")
        monkeypatch.setattr("saev_dist.replay_report.free_disk", lambda dpath: 10**6)
        replay.run(replace(cfg, dry_run=True))
        said = capsys.readouterr().err
        assert f"the pictures may take about {stated} of disk; 1.0 MB are free" in said and "--img-scale" in said
        return
    replay.run(cfg)
    fpaths = [fpath for fpath in (run / "visuals/features").rglob("*") if fpath.is_file()]
    n_images = len({fpath.stem.split("-")[1] for fpath in fpaths if fpath.name != "data.js"})
    assert len(fpaths) == int(n_files)
    assert f" {n_images} to encode again, of {N_IMGS}\n" in text
    unit = {" kB": 1e3, " MB": 1e6}[stated[-3:]]
    held = sum(512 * fpath.stat().st_blocks for fpath in fpaths)
    assert held / 3 < float(stated[:-3]) * unit < held * 3
    replay.run(replace(cfg, dry_run=True))
    assert "is this gallery, finished: open it" in capsys.readouterr().out


def test_bad_requests_are_refused(tmp_path, capsys):
    run = make_run(tmp_path)
    assert "no such feature" in fails(capsys, "replay", "--run", run, "--features", 24)
    assert "Widen --log-freq-range" in fails(capsys, "replay", "--run", run, "--log-freq-range", -9, -8)
    assert "found nothing" in fails(capsys, "replay", "--run", run, "--images", tmp_path / "gone")
    assert "found no pictures" in fails(capsys, "replay", "--run", run, "--images", run)
    assert "seed must not be negative" in fails(capsys, "replay", "--run", run, "--seed", -1)
    assert "has 8 patches; the shards have 6" in fails(capsys, "replay", "--run", run, "--grid", 2, 4)
    assert "is not a run" in fails(capsys, "replay", "--run", tmp_path)
    assert "is no SAE by itself; it holds " in fails(capsys, "replay", "--run", run, "--sae", tmp_path)
    (run / "partials").mkdir()
    (run / "manifest.json").unlink()
    assert "is an unfinished run" in fails(capsys, "replay", "--run", run)


def test_an_altered_score_stops_the_replay(tmp_path, capsys):
    run = make_run(tmp_path)
    values = torch.load(run / "top_values.pt", weights_only=True)
    values[3, 0] += 0.25
    torch.save(values, run / "top_values.pt")
    line = fails(capsys, "replay", "--run", run, "--all", "--no-progress")
    assert "feature 3, slot 0" in line and not (run / "visuals").exists()


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
    until = time.monotonic() + 60
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize("fate", [fates.die, fates.lack_memory])
@pytest.mark.parametrize("how_many_images", ["one", "all"])
def test_a_drawing_process_that_dies_ends_the_replay_with_one_line(tmp_path, monkeypatch, fate, how_many_images):
    run = make_run(tmp_path)
    make_task = replay._task

    def slow_task(job, image):  # by the second image the first one's process has died
        if image.img_i != job.slots["img_i"].min():
            time.sleep(0.1)
            wait_for(lambda: fate is not fates.die or not multiprocessing.active_children())
        return make_task(job, image)

    monkeypatch.setattr(draw, "draw", fate)
    monkeypatch.setattr(replay, "_task", slow_task)
    only = {"all": False, "features": (3,), "n_features": 0, "n_images": 1} if how_many_images == "one" else {}
    with pytest.raises(RunError, match="a drawing process died or had not enough memory; lower --workers"):
        replay.run(make_replay(run, **only))


def test_pictures_too_large_to_be_stored_are_refused_with_one_line(tmp_path, capsys):
    run = make_run(tmp_path)
    line = fails(capsys, "replay", "--run", run, "--patch-size", 8000, "--no-progress", "--workers", 1)
    assert "would be drawn as" in line and "Lower --img-scale or --patch-size" in line


def test_drawing_processes_import_neither_torch_nor_matplotlib():
    code = "import sys, saev_dist.draw; print(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert draw.file_names(3, 17, "webp") == ("003-17.webp", "003-17-heatmap.webp")


def test_the_gallery_remembers_what_it_was_made_of(tmp_path):
    run = make_run(tmp_path)
    replay.run(make_replay(run, all=False, n_features=5, seed=3))
    identity = json.loads((run / "visuals/replay.json").read_text())
    assert len(identity["features"]) == 5 and identity["geometry"]["fit"] == "grid"


def test_what_a_summary_says_of_images_and_of_scores_on_the_edge():
    slots = np.zeros(3, SLOT)
    slots["img_i"] = [0, 0, 1]
    assert replay_report._encoded(slots, 2) == "2 encoded again"
    assert replay_report._encoded(slots, 3).startswith("2 encoded again (3 times in all: ")
    assert report.describe_edge(0) == "" and report.describe_edge(1).startswith(", 1 more")
