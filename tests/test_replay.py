"""Replay: pictures equal brute force, the same files on any number of ranks, resumed after a kill, and its bad input."""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from saev_dist import draw, extract, replay
from saev_dist.cli import parse
from saev_dist.config import Extract, Replay
from saev_dist.data.images import load_picture
from saev_dist.errors import DataError, Preempted, RunError
from saev_dist.records import Records
from saev_dist.render.geometry import Geometry
from saev_dist.render.heatmap import highlight
from saev_dist.sae.saev import save_saev
from saev_dist.store import Run
from tests.ranks import run_ranks, server
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
    few = {"n_distributions": 2}  # matplotlib takes its time for each
    extract.run(Extract(shards=shards, sae=sae, out=out, layer=4, top_k=9, progress=False, **few | settings))
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


def test_a_replay_that_died_draws_only_what_is_missing(tmp_path, monkeypatch):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images)
    replay.run(cfg)
    whole = tree(run / "visuals")
    n_pictures = sum(name.endswith("-heatmap.png") for name in whole)

    drawn: list[int] = []
    append = Records.append

    def die_half_way(records, file, best_m, *rest):
        if len(drawn) >= 6:
            raise RunError("killed")
        drawn.append(len(best_m))
        append(records, file, best_m, *rest)

    monkeypatch.setattr(Records, "append", die_half_way)
    with pytest.raises(RunError, match="killed"):
        replay.run(make_replay(run, images=images, force=True))
    assert tree(run / "visuals") == whole  # the former gallery stays until the new one is whole
    records = next((run / "visuals.partial").glob("records.*.bin"))
    records.write_bytes(records.read_bytes() + b"torn")  # a write that a kill cut off

    monkeypatch.undo()
    said: list[dict] = []
    summary = replay._summary
    monkeypatch.setattr(replay, "_summary", lambda job, reports: said.extend(reports) or summary(job, reports))
    (run / "visuals/replay.json").write_text("{}")
    replay.run(cfg)
    assert tree(run / "visuals") == whole
    assert 0 < sum(drawn) < n_pictures and said[0]["n_pictures"] == n_pictures - sum(drawn)


class Killed(BaseException):
    """Nothing handles it, as nothing handles a kill."""


CHANGES = ((os, "replace"), (shutil, "rmtree"), (Path, "unlink"))
SMALL_CHANGES = ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"))
"""Of which removing a tree has many."""


def die_in(name: str, step: int, monkeypatch: pytest.MonkeyPatch, changes: tuple = CHANGES) -> None:
    """Die in that function of `replay` before the change number `step` of the file system."""
    calls, function = iter(range(1000)), getattr(replay, name)

    def mortal(change):
        def change_or_die(*args, **settings):
            if next(calls) == step:
                raise Killed
            return change(*args, **settings)

        return change_or_die

    def function_or_die(*args, **settings):
        with pytest.MonkeyPatch.context() as dying:
            for owner, operation in changes:
                dying.setattr(owner, operation, mortal(getattr(owner, operation)))
            function(*args, **settings)

    monkeypatch.setattr(replay, name, function_or_die)


@pytest.mark.parametrize("former", [False, True], ids=["first", "again"])
def test_a_kill_at_any_step_of_the_swap_loses_nothing(tmp_path, monkeypatch, former):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images, all=False, features=(3, 5), n_features=0)
    replay.run(cfg)
    whole = tree(run / "visuals")
    n_drawn: list[int] = []
    summary = replay._summary
    monkeypatch.setattr(
        replay, "_summary", lambda job, reports: n_drawn.append(reports[0]["n_pictures"]) or summary(job, reports)
    )
    for step in range(20):
        shutil.rmtree(run / "visuals")
        if former:
            (run / "visuals").mkdir()
            (run / "visuals/index.html").write_text("of other features")
            (run / "visuals/replay.json").write_text("{}")
        try:
            with monkeypatch.context() as dying:
                die_in("_publish", step, dying)
                replay.run(cfg)
            break
        except Killed:
            n_drawn.clear()
        if former:
            assert (run / "visuals/index.html").exists() or (run / "visuals.former/index.html").exists()
        replay.run(cfg)
        assert sum(n_drawn) == 0  # all was drawn before
        assert tree(run / "visuals") == whole
        assert [path.name for path in run.iterdir() if path.name.startswith("visuals")] == ["visuals"]
    assert step == (4 if former else 2)  # so many changes there are


def remove_from_below(dpath: Path) -> None:
    """`shutil.rmtree` in the order that leaves most behind; directories have any."""
    for parent, dnames, fnames in os.walk(dpath, topdown=False):
        for name in fnames:
            os.unlink(os.path.join(parent, name))
        for name in dnames:
            os.rmdir(os.path.join(parent, name))
    os.rmdir(dpath)


def draw_all_and_die(cfg: Replay) -> None:
    with pytest.MonkeyPatch.context() as dying:
        die_in("_publish", 0, dying)
        with pytest.raises(Killed):
            replay.run(cfg)


def test_a_kill_while_a_former_attempt_is_removed_leaves_nothing_that_counts(tmp_path, monkeypatch):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    settings = {"images": images, "all": False, "features": (3, 5), "n_features": 0}
    cfg, again = (make_replay(run, **settings, force=force) for force in (False, True))
    replay.run(cfg)
    whole = tree(run / "visuals")
    shutil.rmtree(run / "visuals")
    draw_all_and_die(cfg)
    left = shutil.copytree(run / "visuals.partial", tmp_path / "left")
    n_deaths = 0
    for step in (0, 1, 2, 5, len(whole) - 5, len(whole) + 20):
        shutil.rmtree(run / "visuals.partial", ignore_errors=True)
        shutil.copytree(left, run / "visuals.partial")
        try:
            with monkeypatch.context() as dying:
                dying.setattr(shutil, "rmtree", remove_from_below)
                die_in("_begin", step, dying, SMALL_CHANGES)
                replay.run(again)
        except Killed:
            n_deaths += 1
            replay.run(cfg)
        assert tree(run / "visuals") == whole, step
        shutil.rmtree(run / "visuals")
    assert n_deaths == 5


@pytest.mark.parametrize("lost", ["removed", "empty", "record"])
def test_what_a_crash_of_the_machine_took_is_drawn_again(tmp_path, capsys, lost):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images, all=False, features=(3, 5), n_features=0)
    replay.run(cfg)
    whole = tree(run / "visuals")
    shutil.rmtree(run / "visuals")
    draw_all_and_die(cfg)
    victim = sorted((run / "visuals.partial/features/3").glob("*-heatmap.png"))[1]
    records = next((run / "visuals.partial").glob("records.*.bin"))
    match lost:
        case "removed":
            victim.unlink()
        case "empty":
            victim.write_bytes(b"")
        case "record":  # its middle is zeros
            content = bytearray(records.read_bytes())
            content[len(content) // 2 - 20 : len(content) // 2 + 20] = bytes(40)
            records.write_bytes(content)
    replay.run(cfg)
    assert tree(run / "visuals") == whole
    assert re.search(
        r"warning: .*records\.00000\.bin: [12] pictures are not whole and will be drawn again", capsys.readouterr().err
    )


def test_a_run_that_was_computed_again_meanwhile_is_not_drawn(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    lock = Run.lock

    @contextmanager
    def late(store):
        extract.run(
            Extract(shards=tmp_path / "shards", sae=tmp_path / "sae.pt", out=run, layer=4, top_k=8, progress=False, force=True)
        )
        with lock(store):
            yield

    monkeypatch.setattr(replay, "Run", type("Late", (Run,), {"lock": late}))
    with pytest.raises(RunError, match="has changed: another process computed it again"):
        replay.run(make_replay(run))
    assert not list(run.glob("visuals*"))


def test_a_replay_that_is_killed_outright_goes_on_with_any_number_of_ranks(tmp_path):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images", size=(600, 400))
    args = ("replay", "--run-dir", run, "--images", images, "--all", "--n-images", 9, "--patch-size", 90, "--workers", 1)
    assert run_ranks(*args).returncode == 0
    whole = tree(run / "visuals")
    shutil.rmtree(run / "visuals")
    n_left = [0]
    for _ in range(2):
        killed, until = server().start(*args), time.monotonic() + 60
        while sum(path.stat().st_size for path in run.glob("visuals.partial/records.*")) <= n_left[-1]:
            assert time.monotonic() < until, killed.output()
            time.sleep(0.005)
        server().kill(killed)
        assert server().wait(killed) == [-signal.SIGKILL]
        n_left.append(sum(path.stat().st_size for path in run.glob("visuals.partial/records.*")))
    assert 0 < n_left[1] <= n_left[2] and not (run / "visuals").exists()
    done = run_ranks(*args, n_ranks=3)
    assert done.returncode == 0, done.stderr
    assert tree(run / "visuals") == whole


def test_a_second_replay_of_one_run_is_refused(tmp_path, capsys):
    """Each would take the other's pictures for its own."""
    run = make_run(tmp_path)
    with Run(run).lock():
        assert f"{run} is in use by process {os.getpid()} on " in fails(capsys, "replay", "--run", run, "--no-progress")
        assert not (run / "visuals.partial").exists()
    replay.run(make_replay(run))
    assert not (run / "partials").exists()


def test_a_linked_gallery_is_replaced_and_what_it_links_to_stays(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept.txt").write_text("kept")
    (run / "visuals").symlink_to(tmp_path / "elsewhere")
    for n_features in (2, 3):
        replay.run(make_replay(run, all=False, n_features=n_features))
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("visuals")) == ["visuals"]
    assert (run / "visuals/index.html").exists() and (tmp_path / "elsewhere/kept.txt").exists()


def test_a_file_in_the_gallerys_place_is_refused_before_anything_is_drawn(tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "visuals").write_text("mine")
    assert "visuals is in the way" in fails(capsys, "replay", "--run", run, "--all", "--no-progress")
    assert (run / "visuals").read_text() == "mine" and not (run / "visuals.partial").exists()


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


def test_what_no_replay_made_is_not_thrown_away(tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "visuals").mkdir()
    (run / "visuals/index.html").write_text("mine")
    assert "visuals holds index.html, which no replay made" in fails(capsys, "replay", "--run", run, "--no-progress")
    assert not (run / "partials").exists(), "a finished run looks finished"
    (run / "visuals/index.html").unlink()
    replay.run(make_replay(run, all=False, n_features=2))
    (run / "visuals/notes.txt").write_text("mine")
    (run / "visuals/.DS_Store").write_text("nobody's")
    before = tree(run / "visuals")
    assert "visuals holds notes.txt, which no" in fails(capsys, "replay", "--run", run, "--force", "--all", "--no-progress")
    assert tree(run / "visuals") == before and not (run / "visuals.partial").exists()
    (run / "visuals/notes.txt").rename(run / "visuals/features/notes.txt")
    assert "visuals holds features/notes.txt, which no" in fails(capsys, "replay", "--run", run, "--force", "--no-progress")
    (run / "visuals/features/notes.txt").unlink()
    replay.run(make_replay(run, all=False, n_features=3))
    assert not (run / "visuals/.DS_Store").exists()


@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_a_picture_that_is_not_on_record_once_stops_the_replay(tmp_path, monkeypatch, fault):
    """A file system that not all ranks share, or another replay in the same directory."""
    run = make_run(tmp_path)
    write = replay._write_features

    def spoiled(job, features):
        fpath = job.records.fpaths()[0]
        rows = np.fromfile(fpath, job.records.dtype)
        (rows[1:] if fault == "lost" else np.append(rows, rows[:1])).tofile(fpath)
        write(job, features)

    monkeypatch.setattr(replay, "_write_features", spoiled)
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


def test_a_finished_gallery_is_left_as_it_is_and_another_takes_its_place(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    replay.run(make_replay(run, images=images))
    before = (run / "visuals/index.html").stat().st_mtime_ns
    replay.run(make_replay(run, images=images))
    assert "finished" in capsys.readouterr().out and (run / "visuals/index.html").stat().st_mtime_ns == before
    replay.run(make_replay(run, images=images, all=False, features=(3,), n_features=0))
    assert "has a gallery of 23 features; this one of 1 will replace it" in capsys.readouterr().out
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
    assert "none found (name them with --images): heatmaps on a plain ground" in capsys.readouterr().out
    heatmaps = [np.asarray(Image.open(fpath)) for fpath in (run / "visuals/features").rglob("*-heatmap.png")]
    assert {heatmap.shape for heatmap in heatmaps} == {(48, 32, 3)}
    assert max(len(np.unique(heatmap.reshape(-1, 3), axis=0)) for heatmap in heatmaps) > 2


def test_pictures_that_are_not_where_the_metadata_says_are_a_warning(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    monkeypatch.setattr("saev_dist.data.shards._dataset", lambda md: "/elsewhere")
    replay.run(make_replay(run, pictures=False))
    assert "/elsewhere" not in capsys.readouterr().err
    replay.run(make_replay(run, force=True))
    assert "names /elsewhere for its pictures, which is no folder here" in capsys.readouterr().err


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


def test_a_name_of_two_lines_with_escape_sequences_stays_one_line_of_text(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    first = min(images.rglob("*.png"))
    first.rename(first.with_name("000\n\x1b[31m\u2028.png")).write_text("no picture")
    line = fails(capsys, "replay", "--run", run, "--images", images, "--all", "--n-images", 99, "--workers", 1, "--no-progress")
    assert r"000\n\x1b[31m\u2028.png is not a picture" in line


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png is no file; expected a picture"):
        load_picture(tmp_path, "x.png", in_data_set=False)


def test_a_picture_never_starts_another_program(tmp_path, monkeypatch):
    """Pillow hands Encapsulated PostScript, whatever its name, to a `gs` on the path."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n%%EOF\n")
    with pytest.raises(DataError, match=r"x\.png is not a picture"):
        load_picture(tmp_path, "x.png", in_data_set=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "webp"), ("I;16", "png"), ("F", "tif")],
)
def test_pictures_of_every_mode_are_read_as_rgb(tmp_path, mode, extension):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8))
    picture = rgb.convert("L").convert("I").convert("I;16") if mode == "I;16" else rgb.convert(mode)
    picture.save(tmp_path / f"x.{extension}")
    read = load_picture(tmp_path, f"x.{extension}", in_data_set=False)
    assert (read.mode, read.size) == ("RGB", (6, 4))


def test_sound_pictures_with_odd_metadata_are_read_without_a_warning(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    content = bytearray((tmp_path / "x.jpg").read_bytes())
    n_tags = content.index(b"Exif\0\0") + 14
    content[n_tags : n_tags + 2] = b"\0\x09"  # of which there is one
    (tmp_path / "x.jpg").write_bytes(content)
    Image.new("P", (6, 4)).save(tmp_path / "x.png", transparency=bytes(8))
    for name in ("x.jpg", "x.png"):
        assert load_picture(tmp_path, name, in_data_set=False).size == (6, 4)


def test_a_rotation_flag_is_left_alone_as_the_writers_loader_leaves_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter when shown
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert load_picture(tmp_path, "x.jpg", in_data_set=False).size == (6, 4)


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


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "visuals.partial").write_text("in the way")
    line = fails(capsys, "replay", "--run", run, "--all", "--no-progress")
    assert "visuals.partial: cannot write: Not a directory" in line and "--out" not in line  # replay has no such flag


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


NO_CAPABILITIES = """
import ctypes
libc, version_and_pid, none = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS: nor do the drawing processes get them back
assert libc.capset(version_and_pid, none) == 0
"""
"""Root is bound by permissions as everybody else; capabilities(7)."""


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("run", "run/manifest.json: cannot read: Permission denied; make it readable"),
        ("images", "cannot list the images (Permission denied)"),
        ("images/class1", "class1: cannot list the images (Permission denied)"),
        ("images/class1/010.png", "010.png cannot be read: Permission denied"),
        ("sae.pt", "sae.pt: Permission denied; an SAE should be there"),
        ("run/visuals/replay.json", ""),  # of a gallery that is replaced
    ],
)
def test_what_one_may_not_look_at_is_named(tmp_path, closed, words):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    (run / "visuals").mkdir()
    (run / "visuals/replay.json").touch()
    (tmp_path / closed).chmod(0)
    done = run_ranks("replay", "--run", run, "--images", images, "--all", "--n-images", 99, before=NO_CAPABILITIES)
    (tmp_path / closed).chmod(0o755)  # so that pytest can remove it
    if not words:
        assert done.returncode == 0 and (run / "visuals/index.html").exists(), done.stderr
        return
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


@pytest.fixture
def columns(tmp_path, capsys):
    """Writes a data set of these columns over the pictures of `make_pictures`."""
    datasets = pytest.importorskip("datasets")
    fpaths = [str(fpath) for fpath in sorted(make_pictures(tmp_path / "images").rglob("*.png"))]

    def save(name="set", image=None, label=None):
        rows = {"image": image or fpaths} | ({"label": label} if label else {})
        kinds = {"image": datasets.Value("string") if image == fpaths else datasets.Image()}
        kinds |= {"label": datasets.ClassLabel(names=["a", "b"])} if label else {}
        datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(tmp_path / name)
        capsys.readouterr()  # its progress
        return fpaths, tmp_path / name

    return save


@pytest.mark.parametrize("missing", [-1, None])
def test_rows_of_a_data_set_without_a_class_have_no_label(tmp_path, columns, missing):
    """The test splits of public data sets have -1 everywhere."""
    _, dpath = columns(label=[missing, 1] + [missing] * (N_IMGS - 2))
    run = make_run(tmp_path)
    replay.run(make_replay(run, images=dpath, patch_size=5))
    labels = pyarrow.parquet.read_table(run / "visuals/images.parquet").column("label").to_pylist()
    assert labels == ["", "b"] + [""] * (N_IMGS - 2)


def test_data_sets_without_pictures_are_refused_with_one_line(tmp_path, capsys, columns):
    run = make_run(tmp_path)
    flags = ("--all", "--n-images", 99, "--workers", 1, "--no-progress")
    fpaths, whole = columns("whole")
    _, gap = columns("gap", image=[None, *fpaths[1:]])
    _, texts = columns("texts", image=fpaths)
    (whole / "state.json").write_text("[]")
    for dpath, words in (
        (whole, "is no data set that `datasets` can read: TypeError"),
        (gap, "picture 0 is not there: the row has no picture"),
        (texts, "image (Value); expected one named image, of kind Image"),
    ):
        assert words in fails(capsys, "replay", "--run", run, "--images", dpath, *flags)


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


def die(task: object) -> None:
    os._exit(1)


def lack_memory(task: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("fate", [die, lack_memory])
@pytest.mark.parametrize("how_many_images", ["one", "all"])
def test_a_drawing_process_that_dies_ends_the_replay_with_one_line(tmp_path, monkeypatch, fate, how_many_images):
    run = make_run(tmp_path)
    make_task = replay._task

    def slow_task(job, image):  # by the second image the first one's process has died
        if image.img_i != job.slots["img_i"].min():
            time.sleep(0.1)
            while multiprocessing.active_children() and fate is die:
                time.sleep(0.1)
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


def test_drawing_processes_import_no_torch():
    code = "import sys, saev_dist.draw; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert draw.file_names(3, 17, "webp") == ("003-17.webp", "003-17-heatmap.webp")


def test_a_gallery_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    done, move = [], os.replace

    def note(old, new):
        done.append(Path(new).name)
        move(old, new)

    run = make_run(tmp_path)
    replay.run(make_replay(run, all=False, n_features=2))
    monkeypatch.setattr(replay, "sync_file_system", lambda dpath: done.append(f"{dpath.name}, {len(list(dpath.iterdir()))}"))
    monkeypatch.setattr(replay, "fsync_dir", lambda dpath: done.append("visuals' folder"))
    monkeypatch.setattr(replay.os, "replace", note)
    replay.run(make_replay(run, all=False, n_features=3))
    synced = f"visuals.partial, {len(list((run / 'visuals').iterdir())) + 1}"  # and the records
    assert [name for name in done if name.startswith("visuals")] == [synced, "visuals.former", "visuals", "visuals' folder"]


def test_a_signal_before_the_swap_leaves_the_former_gallery(tmp_path, monkeypatch):
    run, write_page = make_run(tmp_path), replay._write_page
    replay.run(make_replay(run, all=False, n_features=2))
    before = tree(run / "visuals")

    def leave(world):
        raise Preempted("leave")

    def write_and_strike(job):
        write_page(job)
        monkeypatch.setattr(replay.World, "check", leave)

    with monkeypatch.context() as patch:
        patch.setattr(replay, "_write_page", write_and_strike)
        with pytest.raises(Preempted):
            replay.run(make_replay(run, all=False, n_features=3))
    assert tree(run / "visuals") == before
    monkeypatch.undo()
    replay.run(make_replay(run, all=False, n_features=3))
    assert len(list((run / "visuals/features").iterdir())) == 3


def test_the_gallery_remembers_what_it_was_made_of(tmp_path):
    run = make_run(tmp_path)
    replay.run(make_replay(run, all=False, n_features=5, seed=3))
    identity = json.loads((run / "visuals/replay.json").read_text())
    assert len(identity["features"]) == 5 and identity["geometry"]["fit"] == "grid"
