"""Replays that the disk refuses something: they end well or with one line, and the next one makes the same gallery."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.crash import Fault, FaultyServer, operations
from tests.replays import make_pictures, make_run, tree

QUICK = "from saev_dist.render import plots as p; p.density_png = p.distributions_png = lambda *arrays: bytes(5000)"
"""Code for `before`: matplotlib takes more time for its two figures than all the rest."""
NEWS = ("saev-dist: warning: ", "2 features: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, server):
    """A run, the command that draws it, and its gallery."""
    dpath = tmp_path_factory.mktemp("whole")
    run, images = make_run(dpath), make_pictures(dpath / "images")
    args = ["replay", "--run-dir", run, "--images", images, "--features", 3, 5, "--n-features", 0, "--n-images", 3]
    args += ["--workers", 1, "--no-progress"]
    assert server.run(*args, before=QUICK)[0] == [0]
    gallery = tree(run / "visuals")
    shutil.rmtree(run / "visuals")
    return run, args, gallery


def strike(server: FaultyServer, whole, fault: Fault, roots: tuple[Path, ...]) -> bool:
    """Whether the struck replay failed; the gallery is right in the end."""
    run, args, gallery = whole
    (code,), output = server.run(*args, before=QUICK, fault=fault, roots=roots)
    failed = code != 0
    if failed:
        lines = [line for line in output.splitlines() if not line.startswith(NEWS)]
        assert code == 1 and len(lines) == 1 and lines[0].startswith("saev-dist: error: "), (fault, output)
        (code,), output = server.run(*args, before=QUICK)
    assert code == 0, (fault, output)
    assert tree(run / "visuals") == gallery, fault
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("visuals")) == ["visuals"], fault
    shutil.rmtree(run / "visuals")
    return failed


@pytest.mark.parametrize(("how", "fails"), [("short", False), ("28", True)])
def test_a_record_that_is_written_in_part_or_not_at_all_is_no_other_record(server, whole, how, fails):
    fpath = whole[0] / "visuals.partial/records.00000.bin"
    for at in (1, 2):
        assert strike(server, whole, Fault(ops="w", at=at, how=how), (fpath,)) == fails


def test_every_file_operation_may_fail_once(server, whole, tmp_path):
    """Of each kind of file one, and all operations on all of them where SOAK is set."""
    run, args, _ = whole
    every = "SOAK" in os.environ
    for op, how in {"w": "28", "m": "5", "u": "5", "o": "28"}.items() if every else [("w", "28"), ("m", "5")]:
        log = tmp_path / f"{op}.log"
        assert server.run(*args, before=QUICK, fault=Fault(ops=op, at=0, how=how), roots=(run / "visuals",), log=log)[0] == [0]
        shutil.rmtree(run / "visuals")
        done = operations(log)
        assert done
        chosen = done if every else list({re.sub(r"\d+", "#", what): (at, what) for at, what in done}.values())
        failed = [  # who was not struck does not fail
            what for at, what in chosen if strike(server, whole, Fault(ops=op, at=at, how=how, what=what), (run / "visuals",))
        ]
        assert op not in "wm" or len(failed) == len(chosen), {what for _, what in chosen} - set(failed)
        assert op != "m" or f"rename {run / 'visuals.partial'}" in failed, "the one that gives the gallery its name"
