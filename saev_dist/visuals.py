"""The directory of a run's gallery: `<run>/visuals.partial/` while it is made, `<run>/visuals/` once it is whole.

A replay may die at any step. The next one finds a finished gallery, or one that is drawn in part and goes on with it, or
brings back the one that was about to be replaced (`visuals.former/`, for the moment between two renames). What no replay
made is not thrown away.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from saev_dist.errors import RunError
from saev_dist.files import fsync_dir, replacing, sync_file_system, writing

CONTENT = (
    "replay.json",
    "features",
    "index.html",
    "data.js",
    "features.parquet",
    "features.csv",
    "images.parquet",
    "density.png",
    "distributions.png",
)
NOBODYS = {".DS_Store", "Thumbs.db"}
"""Files that file managers leave."""


class Visuals:
    """The gallery of a run, made or to be made.

    Args:
        run_dpath: the run directory.
        identity: what is drawn; JSON. A gallery of another identity is another gallery.
    """

    def __init__(self, run_dpath: Path, identity: dict[str, Any]) -> None:
        self.dpath = run_dpath / "visuals"
        self.partial_dpath = run_dpath / "visuals.partial"
        self.former_dpath = run_dpath / "visuals.former"
        self.identity = identity

    def is_done(self) -> bool:
        """Whether this very gallery is finished."""
        try:
            return (self.dpath / "replay.json").read_bytes() == self._marker()
        except OSError:  # not there, or not to be read
            return False

    def bring_back(self) -> None:
        """Give a gallery its name back that a replay which died between its last two renames took from it."""
        if self.former_dpath.is_dir() and not os.path.lexists(self.dpath):
            with writing(self.dpath):
                os.replace(self.former_dpath, self.dpath)

    def begin(self, *, afresh: bool) -> None:
        """Make `visuals.partial/`, or find it as an earlier attempt at the same gallery left it.

        Args:
            afresh: what an earlier attempt left does not count.

        Raises:
            RunError: what is in the gallery's place was made by no replay, or nothing can be written there.
        """
        if os.path.lexists(self.dpath) and not self.dpath.is_dir():
            raise RunError(f"{self.dpath} is in the way: it is no directory. Move it elsewhere.")
        with writing(self.dpath):
            strangers = _strangers(self.dpath)
        if strangers:
            raise RunError(
                f"{self.dpath} holds {strangers[0]}, which no replay made and which would go with the old gallery. "
                "Move it elsewhere."
            )
        with writing(self.partial_dpath):
            marker_fpath = self.partial_dpath / "replay.json"
            if self.partial_dpath.exists():
                if not afresh and marker_fpath.exists() and marker_fpath.read_bytes() == self._marker():
                    return
                marker_fpath.unlink(missing_ok=True)  # first: without it the rest means nothing, should we die in here
                _remove(self.partial_dpath)
            self.partial_dpath.mkdir()
            with replacing(marker_fpath) as file:
                file.write(self._marker())

    def sync(self) -> None:
        """Have all that this machine has written there on the disk."""
        with writing(self.partial_dpath):
            sync_file_system(self.partial_dpath)

    def publish(self) -> None:
        """Give the whole gallery its name. The records go last: after a kill on the way nothing is drawn again."""
        with writing(self.partial_dpath):
            _remove(self.former_dpath)  # of a replay that died after the next two renames
            if self.dpath.exists():
                os.replace(self.dpath, self.former_dpath)
            os.replace(self.partial_dpath, self.dpath)
            fsync_dir(self.dpath.parent)
        self.tidy()

    def tidy(self) -> None:
        """Remove what is no part of a finished gallery; a replay that died in here left it."""
        with writing(self.dpath):
            for fpath in self.dpath.glob("records.*"):
                fpath.unlink(missing_ok=True)
            _remove(self.former_dpath)

    def _marker(self) -> bytes:
        """What replay.json holds."""
        return (json.dumps(self.identity, indent=2) + "\n").encode()


def _strangers(dpath: Path) -> list[str]:
    """What is in a gallery's place and no part of one: all of it, where nothing says that it is one. Of a link only the
    link will go."""
    if dpath.is_symlink() or not dpath.is_dir():
        return []
    found = set(os.listdir(dpath)) - NOBODYS
    if "replay.json" not in found:
        return sorted(found)
    strangers = {name for name in found - set(CONTENT) if not name.startswith(("records.", ".nfs"))}
    if "features" in found:
        strangers |= {f"features/{name}" for name in os.listdir(dpath / "features") if not name.isdecimal()}
    return sorted(strangers - {f"features/{name}" for name in NOBODYS})


def _remove(dpath: Path) -> None:
    """Remove a directory, if it is there. Of a link to one only the link goes."""
    if dpath.is_symlink():
        dpath.unlink()
    elif dpath.exists():
        shutil.rmtree(dpath)
