"""A replay that died goes on, and no gallery is lost to another: not to a kill at any step."""

import os
import re
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from saev_dist import extract, pages, replay, visuals
from saev_dist.config import Extract, Replay
from saev_dist.errors import Preempted, RunError
from saev_dist.lock import Lock
from saev_dist.records import Records
from saev_dist.visuals import Visuals
from tests.crash import wait_for
from tests.ranks import fails, run_ranks, server
from tests.replays import make_pictures, make_replay, make_run, tree


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
    summary = replay.summary
    monkeypatch.setattr(replay, "summary", lambda job, reports: said.extend(reports) or summary(job, reports))
    (run / "visuals/replay.json").write_text("{}")
    replay.run(cfg)
    assert tree(run / "visuals") == whole
    assert 0 < sum(drawn) < n_pictures and said[0]["n_pictures"] == n_pictures - sum(drawn)


def test_records_are_counted_in_the_open_file(tmp_path, monkeypatch, capsys):
    """What a client of NFS remembers of a file's size may be older than what another node has appended to it."""
    records = Records(tmp_path, n_patches=6, image_format="png")
    fpath, stat = tmp_path / "records.00001.bin", os.stat
    fpath.write_bytes(np.zeros(3, records.dtype).tobytes() + b"torn")
    stale = SimpleNamespace(st_size=0)
    monkeypatch.setattr(os, "stat", lambda path, **how: stale if str(path) == str(fpath) else stat(path, **how))
    assert [len(rows) for rows in records.load()] == [3]
    records.keep_sound(fpath)
    assert (
        "3 pictures are not whole, or made of other files, and will be drawn again" in capsys.readouterr().err
        and not fpath.read_bytes()
    )


class Killed(BaseException):
    """Nothing handles it, as nothing handles a kill."""


CHANGES = ((os, "replace"), (shutil, "rmtree"), (Path, "unlink"))
SMALL_CHANGES = ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"))
"""Of which removing a tree has many."""


def die_in(owner: object, name: str, step: int, monkeypatch: pytest.MonkeyPatch, changes: tuple = CHANGES) -> None:
    """Die in that function or method before the change number `step` of the file system."""
    calls, function = iter(range(1000)), getattr(owner, name)

    def mortal(change):
        def change_or_die(*args, **settings):
            if next(calls) == step:
                raise Killed
            return change(*args, **settings)

        return change_or_die

    def function_or_die(*args, **settings):
        with pytest.MonkeyPatch.context() as dying:
            for place, operation in changes:
                dying.setattr(place, operation, mortal(getattr(place, operation)))
            function(*args, **settings)

    monkeypatch.setattr(owner, name, function_or_die)


@pytest.mark.parametrize("former", [False, True], ids=["first", "again"])
def test_a_kill_at_any_step_of_the_swap_loses_nothing(tmp_path, monkeypatch, former):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images, all=False, features=(3, 5), n_features=0)
    replay.run(cfg)
    whole = tree(run / "visuals")
    n_drawn: list[int] = []
    summary = replay.summary
    monkeypatch.setattr(
        replay, "summary", lambda job, reports: n_drawn.append(reports[0]["n_pictures"]) or summary(job, reports)
    )
    for step in range(20):
        shutil.rmtree(run / "visuals")
        if former:
            (run / "visuals").mkdir()
            (run / "visuals/index.html").write_text("of other features")
            (run / "visuals/replay.json").write_text("{}")
        try:
            with monkeypatch.context() as dying:
                die_in(Visuals, "publish", step, dying)
                replay.run(cfg)
            break
        except Killed:
            n_drawn.clear()
        if former:
            assert (run / "visuals/index.html").exists() or (run / "visuals.former/index.html").exists()
            with monkeypatch.context() as dying, suppress(Killed):  # unless it is done
                die_in(replay, "_draw", 0, dying, ((Records, "open_for"),))
                replay.run(cfg)
            assert (run / "visuals/index.html").exists(), "the next replay brings it back, whatever becomes of itself"
        replay.run(cfg)
        assert sum(n_drawn) == 0  # all was drawn before
        assert tree(run / "visuals") == whole
        assert [path.name for path in run.iterdir() if path.name.startswith("visuals")] == ["visuals"]
    assert step == (4 if former else 2)  # so many changes there are


def test_what_a_replay_left_beside_its_gallery_goes_unless_one_is_at_work(tmp_path, capsys):
    run = make_run(tmp_path)
    cfg = make_replay(run, pictures=False, all=False, features=(3,), n_features=0)
    replay.run(cfg)
    (run / "visuals/records.0.bin").touch()
    with Lock(run).hold():
        replay.run(cfg)
        assert (run / "visuals/records.0.bin").exists()
    replay.run(cfg)
    assert not (run / "visuals/records.0.bin").exists() and capsys.readouterr().out.count("is this gallery, finished") == 2


def test_the_gallery_that_a_killed_replay_was_to_replace_is_not_drawn_again(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    first, second = (make_replay(run, pictures=False, all=False, features=(s,), n_features=0) for s in (3, 5))
    replay.run(first)
    gallery = tree(run / "visuals")
    with monkeypatch.context() as dying:
        die_in(Visuals, "publish", 1, dying)
        with pytest.raises(Killed):
            replay.run(second)
    assert not (run / "visuals").exists()
    drawn = tree(run / "visuals.partial")
    capsys.readouterr()
    replay.run(first)
    assert "is this gallery, finished" in capsys.readouterr().out
    assert tree(run / "visuals") == gallery and tree(run / "visuals.partial") == drawn


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
        die_in(Visuals, "publish", 0, dying)
        with pytest.raises(Killed):
            replay.run(cfg)


def test_a_replay_says_what_there_is_to_draw_and_what_is_drawn(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images, all=False, features=(3, 5), n_features=0)
    draw_all_and_die(cfg)
    names = [fpath.stem.split("-") for fpath in run.glob("visuals.partial/features/*/*.*") if "heatmap" in fpath.stem]
    task = f"2 features: {len(names)} pictures, each with and without heatmap, of {len({name[1] for name in names})} images"
    assert re.search(rf"^{task}; about [\d.]+ kB\.$", capsys.readouterr().out, re.M)
    replay.run(cfg)
    going_on = rf"^{task}; about [\d.]+ kB; {len(names)} are drawn already: going on\.$"
    assert re.search(going_on, capsys.readouterr().out, re.M)


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
                die_in(Visuals, "begin", step, dying, SMALL_CHANGES)
                replay.run(again)
        except Killed:
            n_deaths += 1
            replay.run(cfg)
        assert tree(run / "visuals") == whole, step
        shutil.rmtree(run / "visuals")
    assert n_deaths == 5


def test_what_was_drawn_of_pictures_that_were_replaced_is_drawn_again(tmp_path, capsys):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images, all=False, features=(3, 5), n_features=0)
    draw_all_and_die(cfg)
    for fpath in images.rglob("*.png"):
        with Image.open(fpath) as picture:
            picture.convert("L").save(fpath)
    replay.run(cfg)
    assert re.search(r"warning: .*: \d+ pictures are not whole, or made of other files", capsys.readouterr().err)
    found = tree(run / "visuals")
    replay.run(replace(cfg, force=True))
    assert tree(run / "visuals") == found


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
    assert re.search(r"warning: .*records\.00000\.bin: [12] pictures are not whole, or made of", capsys.readouterr().err)


def test_a_run_that_was_computed_again_meanwhile_is_not_drawn(tmp_path, monkeypatch):
    run = make_run(tmp_path)

    class Late(Lock):
        def hold(self, **settings):
            again = {"out": run, "layer": 4, "top_k": 8, "progress": False, "force": True}
            extract.run(Extract(shards=tmp_path / "shards", sae=tmp_path / "sae.pt", **again))
            return super().hold(**settings)

    monkeypatch.setattr(replay, "Lock", Late)
    with pytest.raises(RunError, match="has changed: another process computed it again"):
        replay.run(make_replay(run))
    assert not list(run.glob("visuals*"))


STAYS_AT_THE_THIRD = """
import time, saev_dist.records as r
append, n = r.Records.append, iter(range(99))
r.Records.append = lambda *a: (append(*a), next(n) == 2 and (print("stays", flush=True), time.sleep(600)))
"""


def test_a_replay_that_is_killed_outright_goes_on_with_any_number_of_ranks(tmp_path):
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images", size=(600, 400))
    args = ("replay", "--run-dir", run, "--images", images, "--all", "--n-images", 9, "--patch-size", 90, "--workers", 1)
    assert run_ranks(*args).returncode == 0
    whole = tree(run / "visuals")
    shutil.rmtree(run / "visuals")
    n_left = [0]
    for _ in range(2):
        killed = server().start(*args, before=STAYS_AT_THE_THIRD)
        wait_for(lambda: "stays" in killed.output(), say=killed.output)  # noqa: B023
        server().kill(killed)
        assert server().wait(killed) == [-signal.SIGKILL]
        n_left.append(sum(path.stat().st_size for path in run.glob("visuals.partial/records.*")))
    assert 0 < n_left[1] < n_left[2] and not (run / "visuals").exists()
    done = run_ranks(*args, n_ranks=3)
    assert done.returncode == 0, done.stderr
    assert tree(run / "visuals") == whole


def test_a_second_replay_of_one_run_is_refused(tmp_path, capsys):
    """Each would take the other's pictures for its own."""
    run = make_run(tmp_path)
    with Lock(run).hold():
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


def test_pictures_in_another_order_make_another_gallery(tmp_path, capsys):
    """Neither what is drawn nor what is half drawn of the former order is taken for the new one's."""
    run, images = make_run(tmp_path), make_pictures(tmp_path / "images")
    cfg = make_replay(run, images=images, all=False, features=(3, 5), n_features=0)
    replay.run(cfg)
    shutil.copytree(run / "visuals", tmp_path / "former")
    (images / "class0/000.png").rename(images / "class2/zzz.png")
    draw_all_and_die(cfg)
    (images / "class2/zzz.png").rename(images / "class0/001b.png")
    capsys.readouterr()
    replay.run(cfg)
    assert "has a gallery of 2 features; this one of 2 will replace it" in capsys.readouterr().out
    found = tree(run / "visuals")
    shutil.rmtree(run / "visuals")
    replay.run(cfg)
    assert found == tree(run / "visuals") and found != tree(tmp_path / "former")


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "visuals.partial").write_text("in the way")
    line = fails(capsys, "replay", "--run", run, "--all", "--no-progress")
    assert "visuals.partial: cannot write: Not a directory" in line and "--out" not in line  # replay has no such flag


def test_a_gallery_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    done, move = [], os.replace

    def note(old, new):
        done.append(Path(new).name)
        move(old, new)

    run = make_run(tmp_path)
    replay.run(make_replay(run, all=False, n_features=2))
    monkeypatch.setattr(visuals, "sync_file_system", lambda dpath: done.append(f"{dpath.name}, {len(list(dpath.iterdir()))}"))
    monkeypatch.setattr(visuals, "fsync_dir", lambda dpath: done.append("visuals' folder"))
    monkeypatch.setattr(os, "replace", note)
    replay.run(make_replay(run, all=False, n_features=3))
    synced = f"visuals.partial, {len(list((run / 'visuals').iterdir())) + 1}"  # and the records
    assert [name for name in done if name.startswith("visuals")] == [synced, "visuals.former", "visuals", "visuals' folder"]


def test_a_signal_is_obeyed_between_features(tmp_path, monkeypatch):
    run, writes, feature_js = make_run(tmp_path), [], pages.gallery.feature_js

    def write_and_signal(view):
        writes.append(view.feature)
        os.kill(os.getpid(), signal.SIGUSR1)
        return feature_js(view)

    monkeypatch.setattr(pages.gallery, "feature_js", write_and_signal)
    with pytest.raises(Preempted, match="SIGUSR1: stopped, and what is done is kept in"):
        replay.run(make_replay(run, all=False, n_features=3))
    assert len(writes) == 1


def test_a_signal_before_the_swap_leaves_the_former_gallery(tmp_path, monkeypatch):
    run, write_page = make_run(tmp_path), replay.write_page
    replay.run(make_replay(run, all=False, n_features=2))
    before = tree(run / "visuals")

    def leave(world):
        raise Preempted("leave")

    def write_and_strike(job):
        write_page(job)
        monkeypatch.setattr(replay.World, "check", leave)

    with monkeypatch.context() as patch:
        patch.setattr(replay, "write_page", write_and_strike)
        with pytest.raises(Preempted):
            replay.run(make_replay(run, all=False, n_features=3))
    assert tree(run / "visuals") == before
    monkeypatch.undo()
    replay.run(make_replay(run, all=False, n_features=3))
    assert len(list((run / "visuals/features").iterdir())) == 3
