"""What a replay knows of the pictures that it has drawn: fixed-size records, in a file for each rank.

A record is appended once the picture's files are in place. It holds the scores of all patches, for the page, and is what tells
after a kill that the picture need not be drawn again: where its CRC is right, the files have the recorded sizes, and the
picture that they were made of is the same file as before.

Names: `m` features of one image, `p` patches, `n` records or slots.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from saev_dist import draw
from saev_dist.choose import Slots
from saev_dist.data.images import Pictures
from saev_dist.errors import warn
from saev_dist.files import reading, replacing, write_all, writing

RECORDS_AT_ONCE = 1024


@dataclass(frozen=True)
class Records:
    """The records of a gallery that is being made.

    Args:
        dpath: the gallery's directory: `records.<rank>.bin`, and `features/<i>/` with the pictures.
        n_patches: tokens per image.
        image_format: of the pictures.
        pictures: what they are made of; None: a plain ground.
    """

    dpath: Path
    n_patches: int
    image_format: draw.Format
    pictures: Pictures | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """What is known of one drawn picture."""
        numbers = [(name, "<i8") for name in ("img_i", "feature", "place", "patch_i", "n_cols", "n_rows", "width", "height")]
        values = ("values", "<f4", (self.n_patches,))
        pairs = [(name, "<i8", (2,)) for name in ("n_bytes", "version")]
        return np.dtype([*numbers, *pairs, ("patch", "<f8"), ("score", "<f8"), values, ("crc", "<u4")])

    def open_for(self, rank: int) -> BinaryIO:
        """A rank's file, to append to."""
        fpath = self.dpath / f"records.{rank:05d}.bin"
        with writing(fpath):
            return open(fpath, "ab", buffering=0)

    def append(self, file: BinaryIO, best_m: Slots, values_mp: NDArray[np.float32], drawn: draw.Drawn) -> None:
        """Record one image's pictures.

        Args:
            file: from `open_for`.
            best_m: the image's strongest slot of each feature.
            values_mp: the features' scores.
            drawn: what became of them.
        """
        rows, place = np.zeros(len(best_m), self.dtype), drawn.place
        for name in ("img_i", "feature", "place", "patch_i", "score"):
            rows[name] = best_m[name]
        rows["n_cols"], rows["n_rows"] = place.n_cols, place.n_rows
        rows["width"], rows["height"] = place.size
        rows["n_bytes"], rows["version"] = drawn.n_bytes, drawn.version
        rows["patch"], rows["values"] = place.patch, values_mp
        rows["crc"] = [_crc(row) for row in rows]
        with writing(self.dpath):
            write_all(file, memoryview(rows.tobytes()))

    def fpaths(self) -> list[Path]:
        """The files of all ranks, of former attempts too."""
        return sorted(self.dpath.glob("records.*.bin"))

    def load(self) -> list[NDArray[np.void]]:
        """All ranks' records, mapped, not read."""
        found: list[NDArray[np.void]] = []
        for fpath in self.fpaths():
            with reading(fpath):
                rows = self._mapped(fpath)[0]
                if len(rows):
                    found.append(rows)
        return found

    def _mapped(self, fpath: Path) -> tuple[NDArray[np.void], int]:
        """A file's whole records, mapped, and its size. That is the open file's: on NFS only opening asks the server for it."""
        with open(fpath, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            n_records = n_bytes // self.dtype.itemsize
            rows = np.memmap(file, self.dtype, "r", shape=(n_records,)) if n_records else np.empty(0, self.dtype)
        return rows, n_bytes

    def keep_sound(self, fpath: Path) -> None:
        """Drop what an earlier attempt, or a crash of the machine, left torn: records, and those of torn or former pictures."""
        with reading(fpath):
            rows, n_bytes = self._mapped(fpath)
            n_records = len(rows)
            whole_n = np.fromiter((self._is_whole(row) for row in rows), bool, n_records)
        if whole_n.all() and n_bytes == rows.nbytes:
            return
        n_lost = max(1, n_records - int(whole_n.sum()))
        warn(f"{fpath}: {n_lost:,} pictures are not whole, or made of other files, and will be drawn again.")
        with writing(fpath), replacing(fpath) as file:
            for first in range(0, n_records, RECORDS_AT_ONCE):
                part = slice(first, first + RECORDS_AT_ONCE)
                file.write(rows[part][whole_n[part]].tobytes())

    def _is_whole(self, row: Any) -> bool:
        names = draw.file_names(int(row["place"]), int(row["img_i"]), self.image_format)
        fpaths = [self.dpath / "features" / str(row["feature"]) / name for name in names]
        try:
            if row["crc"] != _crc(row) or [fpath.stat().st_size for fpath in fpaths] != row["n_bytes"].tolist():
                return False
        except FileNotFoundError:
            return False
        return self.pictures is None or self.pictures.version(int(row["img_i"])) == tuple(row["version"].tolist())

    def missing(self, slots_n: Slots) -> Slots:
        """The slots whose picture is not drawn yet."""
        records = self.load()
        if not records:
            return slots_n
        n_features = int(slots_n["feature"].max(initial=0)) + 1
        done = np.concatenate([part["img_i"] * n_features + part["feature"] for part in records])
        return slots_n[~np.isin(slots_n["img_i"] * n_features + slots_n["feature"], done)]


def _crc(row: Any) -> int:
    """CRC-32 of a record up to its own."""
    return zlib.crc32(row.tobytes()[: -row.dtype["crc"].itemsize])
