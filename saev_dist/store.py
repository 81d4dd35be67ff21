"""The run directory: artifact names, writes that are whole or absent, spill files.

    <run>/                   artifacts under their final names, each complete; manifest.json last
    <run>/partials/          of a run under way: run.json (what it is), spill files, artifacts not yet renamed

A file is written under `partials/`, fsynced, and renamed into place once all artifacts are written. So a run directory
without manifest.json is unfinished, and one with it is done.
"""

import errno
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.errors import RunError
from saev_dist.fields import Fields

COPY_BYTES = 8 * 1024 * 1024
ARTIFACT_PATTERNS = (
    "top_values.pt",
    "top_img_i.pt",
    "top_patch_i.pt",
    "sparsity.pt",
    "mean_values.pt",
    "percentiles_p*.pt",
    "histograms.pt",
    "distributions.pt",
    "img_acts.npz",
    "metrics.json",
)


class Run:
    """One run directory.

    Args:
        dpath: the directory; it need not exist.
    """

    def __init__(self, dpath: Path) -> None:
        self.dpath = dpath
        self.partials_dpath = dpath / "partials"
        self.manifest_fpath = dpath / "manifest.json"

    def manifest(self) -> Fields | None:
        """The manifest of a finished run, or None."""
        return _read_json(self.manifest_fpath)

    def artifacts(self) -> list[Path]:
        """Files here that carry an artifact's name."""
        return sorted(fpath for pattern in ARTIFACT_PATTERNS for fpath in self.dpath.glob(pattern))

    def is_finished(self, identity: dict[str, Any], *, force: bool) -> bool:
        """Whether this very run is done; refuse a directory that another run occupies. Changes nothing.

        Args:
            identity: what the bytes of the artifacts depend on.
            force: consider the directory free.

        Raises:
            RunError: the directory holds another run, finished or not, or artifacts of unknown origin.
        """
        if force:
            return False
        finished = self.manifest()
        under_way = _read_json(self.partials_dpath / "run.json")
        holder = finished or under_way
        if holder is None:
            if strangers := self.artifacts():
                raise RunError(
                    f"{self.dpath} holds {strangers[0].name} but no manifest.json: artifacts of something else, or of a run "
                    "that died while it put them in place. Choose another --out, or replace them with --force."
                )
            return False
        theirs = holder.get("identity", dict)
        differing = [key for key in sorted(identity | theirs) if identity.get(key) != theirs.get(key)]
        if differing:
            details = "; ".join(
                f"{key}: there {_brief(theirs.get(key))}, here {_brief(identity.get(key))}" for key in differing
            )
            raise RunError(f"{self.dpath} holds another run ({details}). Choose another --out, or replace it with --force.")
        return finished is not None

    def begin(self, identity: dict[str, Any]) -> None:
        """Make the directory and a fresh `partials/`; what an earlier, unfinished attempt left there goes."""
        with writing(self.partials_dpath):
            self.dpath.mkdir(parents=True, exist_ok=True)
            if self.partials_dpath.exists():
                shutil.rmtree(self.partials_dpath)
            self.partials_dpath.mkdir()
        self.stage_json("run.json", {"identity": identity})

    @contextmanager
    def stage(self, name: str) -> Iterator[BinaryIO]:
        """A file to write an artifact to, under `partials/`; on return it is on the disk, or gone on failure."""
        fpath = self.partials_dpath / name
        with writing(fpath), open(fpath, "wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                fpath.unlink(missing_ok=True)
                raise

    def stage_tensors(self, name: str, content: Any) -> None:
        """Stage `name` as `torch.save` writes `content`; the bytes depend on the content alone."""
        with self.stage(name) as file:
            sink = _Sink(file)
            try:
                torch.save(content, sink)  # type: ignore[arg-type]  # it needs write and flush only
            except RuntimeError:
                if sink.error is not None:  # torch wraps what the file raised
                    raise sink.error from None
                raise

    def stage_json(self, name: str, content: Any) -> None:
        with self.stage(name) as file:
            file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def publish(self, names: list[str], manifest: dict[str, Any]) -> None:
        """Rename staged artifacts into place, then the manifest; remove `partials/`."""
        self.stage_json("manifest.json", manifest)
        with writing(self.dpath):
            # Until the new manifest is there the directory counts as unfinished.
            self.manifest_fpath.unlink(missing_ok=True)
            for stale in self.artifacts():
                if stale.name not in names:
                    stale.unlink()
            for name in names:
                os.replace(self.partials_dpath / name, self.dpath / name)
            _fsync_dir(self.dpath)
            os.replace(self.partials_dpath / "manifest.json", self.manifest_fpath)
            _fsync_dir(self.dpath)
            shutil.rmtree(self.partials_dpath)

    def load_tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An artifact that is one tensor of this shape.

        Raises:
            RunError: it is missing, damaged, or of another shape.
        """
        fpath = self.dpath / name
        try:
            tensor = torch.load(fpath, weights_only=True)
        except FileNotFoundError:
            raise RunError(f"{fpath} is missing; run extract again with --force.") from None
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise RunError(f"{fpath} is damaged; run extract again with --force.") from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise RunError(f"{fpath} holds {found}; the manifest promises a tensor {shape}. Run extract again with --force.")
        return tensor

    def spill(self, name: str, rank: int) -> "Spill":
        return Spill(self.partials_dpath / f"{name}.{rank:05d}.bin")


class Spill:
    """A rank's rows of one array, appended in data order; the ranks' files, concatenated, are the array.

    A context, which closes the file.

    Args:
        fpath: file to make or read.
    """

    def __init__(self, fpath: Path) -> None:
        self.fpath = fpath
        self._file: BinaryIO | None = None

    def append(self, rows: NDArray[Any]) -> None:
        """Write an array's bytes at the end."""
        with writing(self.fpath):
            if self._file is None:
                self._file = open(self.fpath, "wb", buffering=COPY_BYTES)
            self._file.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        with writing(self.fpath) if kind is None else suppress(OSError):  # a full disk fails a second time here
            self._file.close()

    @property
    def n_bytes(self) -> int:
        """Size so far. A rank that had nothing to do has no file."""
        return self.fpath.stat().st_size if self.fpath.exists() else 0

    def chunks(self, dtype: type[np.generic], n_columns: int = 1) -> Iterator[NDArray[Any]]:
        """The array, flat, whole rows of it, some megabytes at a time."""
        if not self.n_bytes:
            return
        row_bytes = np.dtype(dtype).itemsize * n_columns
        with open(self.fpath, "rb") as file:
            while chunk := file.read(max(1, COPY_BYTES // row_bytes) * row_bytes):
                yield np.frombuffer(chunk, dtype=dtype)


def check_size(spills: list[Spill], n_bytes: int) -> None:
    """Refuse to make an artifact of spill files that do not hold, together, what the plan promises.

    Raises:
        RunError: bytes are missing or too many: another run wrote here, or the file system is not shared by all ranks.
    """
    if (found := sum(spill.n_bytes for spill in spills)) != n_bytes:
        raise RunError(
            f"{spills[0].fpath.parent}: the ranks' {spills[0].fpath.name.split('.')[0]} files hold {found:,} bytes; the plan "
            f"promises {n_bytes:,}. Do all ranks see this directory, and is no other run at work in it? Run again."
        )


def read_columns(spills: list[Spill], n_columns: int, n_rows: int) -> NDArray[np.float32]:
    """The transpose of the float32 rows in spill files: (n_columns, n_rows)."""
    out = np.empty((n_columns, n_rows), np.float32)
    if spills:
        check_size(spills, out.nbytes)
    first = 0
    for spill in spills:
        for chunk in spill.chunks(np.float32, n_columns):
            rows = chunk.reshape(-1, n_columns)
            out[:, first : first + len(rows)] = rows.T
            first += len(rows)
    return out


def write_csr(file: BinaryIO, shape: tuple[int, int], counts: list[Spill], indices: list[Spill], data: list[Spill]) -> None:
    """Write a CSR matrix as `scipy.sparse.save_npz` does, uncompressed, from spill files, some megabytes at a time.

    Args:
        file: where to.
        shape: of the matrix.
        counts: int64 entries per row. indices: int32 columns. data: float32.
    """
    n_entries = sum(int(chunk.sum()) for spill in counts for chunk in spill.chunks(np.int64))
    check_size(counts, 8 * shape[0])
    check_size(indices, 4 * n_entries)
    check_size(data, 4 * n_entries)
    index_dtype = np.dtype(np.int32 if max(n_entries, *shape) <= np.iinfo(np.int32).max else np.int64)

    def pointers() -> Iterator[NDArray[Any]]:
        total = 0
        yield np.zeros(1, index_dtype)
        for spill in counts:
            for chunk in spill.chunks(np.int64):
                ends = total + chunk.cumsum()
                total = int(ends[-1])
                yield ends.astype(index_dtype)

    def concatenated(spills: list[Spill], stored: type[np.generic], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        for spill in spills:
            for chunk in spill.chunks(stored):
                yield chunk.astype(dtype, copy=False)

    members: list[tuple[str, np.dtype[Any], tuple[int, ...], Iterator[NDArray[Any]]]] = [
        ("indices", index_dtype, (n_entries,), concatenated(indices, np.int32, index_dtype)),
        ("indptr", index_dtype, (shape[0] + 1,), pointers()),
        ("format", np.dtype("S3"), (), iter([np.array(b"csr")])),
        ("shape", np.dtype(np.int64), (2,), iter([np.array(shape, np.int64)])),
        ("data", np.dtype(np.float32), (n_entries,), concatenated(data, np.float32, np.dtype(np.float32))),
    ]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, dtype, member_shape, chunks in members:
            # a fixed date: the bytes must not depend on the clock
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": member_shape}
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in chunks:
                    member.write(chunk.tobytes())


@contextmanager
def writing(fpath: Path) -> Iterator[None]:
    """Turn an OSError under way into one line that names the file and what to do."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{fpath}: {err.strerror}; free some space there or choose another --out, then run again.") from None
        raise RunError(f"{fpath}: cannot write: {err.strerror or err}; choose an --out that you can write to.") from None


class _Sink:
    """A file for torch.save that remembers the OSError that torch would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as err:
            self.error = err
            raise

    def flush(self) -> None:
        self._file.flush()


def _read_json(fpath: Path) -> Fields | None:
    try:
        return Fields.parse(fpath.read_bytes(), str(fpath), RunError)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise RunError(f"{fpath}: {err.strerror}.") from None


def _fsync_dir(dpath: Path) -> None:
    fd = os.open(dpath, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:17]}…"
