"""The run directory: artifact names, and writes that are whole or absent.

    <run>/                   artifacts under their final names, each complete; manifest.json last
    <run>/partials/          of a run under way: run.json (what it is), spill files, artifacts not yet renamed

A file is written under `partials/`, fsynced, and renamed into place once all artifacts are written. So a run directory
without manifest.json is unfinished, and one with it is done.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from saev_dist.errors import RunError
from saev_dist.fields import Fields
from saev_dist.spill import Spill, writing

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
        if os.path.isfile(self.dpath):
            raise RunError(f"{self.dpath} is a file; --out takes a directory to make, or that of a finished run.")
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
        tensor = self._load(fpath)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise RunError(f"{fpath} holds {found}; the manifest promises a tensor {shape}. Run extract again with --force.")
        return tensor

    def load_tensors(self, name: str, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Members of an artifact that is a dictionary of tensors.

        Raises:
            RunError: it is missing or damaged, or lacks one of them.
        """
        fpath = self.dpath / name
        content = self._load(fpath)
        if not isinstance(content, dict) or any(not isinstance(content.get(key), Tensor) for key in keys):
            raise RunError(f"{fpath} should hold the tensors {', '.join(keys)}. Run extract again with --force.")
        return {key: content[key] for key in keys}

    def _load(self, fpath: Path) -> Any:
        try:
            return torch.load(fpath, weights_only=True)
        except FileNotFoundError:
            raise RunError(f"{fpath} is missing; run extract again with --force.") from None
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise RunError(f"{fpath} is damaged; run extract again with --force.") from None

    def spill(self, name: str, rank: int) -> Spill:
        return Spill(self.partials_dpath / f"{name}.{rank:05d}.bin")


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
