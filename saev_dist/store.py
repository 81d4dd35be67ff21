"""The run directory: artifact names, and writes that are whole or absent.

    <run>/                   artifacts under their final names, each complete; manifest.json last
    <run>/partials/          of a run under way: run.json (what it is, what the self-check found), lock,
                             partials and spill files (see partials.py), artifacts not yet renamed

An artifact is written under `partials/`, fsynced, and renamed into place once all are written; manifest.json follows,
then partials/ goes, run.json first. (Where img_acts.npz begins with rank 0's own rows it is their file, by a second name.)
So:

- With run.json the run is under way: another attempt continues it, whatever else is there. It does not matter whether
  the last one died while it streamed, merged or renamed: the partials are still there, and give the same bytes.
- With manifest.json and no run.json it is done. What may be left of partials/ means nothing.
- With neither, what is there is not ours, or of a run that died while --force replaced it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from saev_dist.errors import ConfigError, DamagedError, RunError
from saev_dist.fields import Fields
from saev_dist.files import fsync_dir, refuse_lacking, retrying, writing
from saev_dist.identity import contrast, differing
from saev_dist.lock import Lock
from saev_dist.partials import RANK_PATTERNS

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

UNDER_WAY_PATTERNS = ("run.json", "run.json.new", "manifest.json", "*.partial.damaged", *RANK_PATTERNS, *ARTIFACT_PATTERNS)
"""What a run under way writes into `partials/`, but for the lock."""
OURS = {"partials", "slurm", "visuals", "visuals.partial", "visuals.former"}
"""Directories of this program beside the artifacts."""


class Run:
    """One run directory.

    Args:
        dpath: the directory; it need not exist.
    """

    def __init__(self, dpath: Path) -> None:
        self.dpath = dpath
        self.partials_dpath = dpath / "partials"
        self.manifest_fpath = dpath / "manifest.json"
        self.lock = Lock(dpath)

    def manifest(self) -> Fields | None:
        """The manifest of a finished run, or None."""
        return _read_json(self.manifest_fpath)

    def _is_foreign(self) -> bool:
        """Whether there is a manifest.json that is none of ours, and no artifact beside it."""
        try:
            content = json.loads(self.manifest_fpath.read_bytes())
        except OSError:
            return False
        except (ValueError, RecursionError):
            content = None
        is_ours = isinstance(content, dict) and "identity" in content
        return not is_ours and not self.artifacts()

    def _has_begun(self) -> bool:
        """Whether a run is under way here, in whatever state."""
        return os.path.lexists(self.partials_dpath / "run.json")

    def manifest_sha256(self) -> str:
        """Of manifest.json; "" where it cannot be read."""
        try:
            return hashlib.sha256(self.manifest_fpath.read_bytes()).hexdigest()
        except OSError:
            return ""

    def artifacts(self) -> list[Path]:
        """Files here that carry an artifact's name."""
        return sorted(fpath for pattern in ARTIFACT_PATTERNS for fpath in self.dpath.glob(pattern))

    def strangers(self) -> list[str]:
        """Names of what lies in a directory that is no run yet."""
        if self._has_begun() or os.path.exists(self.manifest_fpath) or not os.path.isdir(self.dpath):
            return []
        names = set(os.listdir(self.dpath)) - OURS - {fpath.name for fpath in self.artifacts()}
        if os.path.isdir(self.partials_dpath):
            inside = set(os.listdir(self.partials_dpath)) - {"lock"} - {fpath.name for fpath in self._work()}
            names |= {f"partials/{name}" for name in inside}
        return sorted(names)

    def under_way(self) -> Fields | None:
        """What run.json says of the run that is not finished here, or None."""
        return _read_json(self.partials_dpath / "run.json")

    def is_of_job(self, job_id: str | None, identity: dict[str, Any]) -> bool:
        """Whether an attempt of this very run has begun here and not finished, or has finished as this job of a scheduler."""
        try:
            under_way = self.under_way()
            holder = under_way or self.manifest()
        except DamagedError:  # nobody can tell
            return False
        if holder is None or differing(identity, holder.get("identity", dict)):
            return False
        return under_way is not None or (job_id is not None and holder.obj.get("job_id") == job_id)

    def is_finished(self) -> bool:
        """Whether a run is done here, and none under way; `refuse_others` has seen that it is the one that is meant."""
        return self.under_way() is None and self.manifest() is not None

    def refuse_others(self, identity: dict[str, Any], *, force: bool) -> None:
        """Refuse a directory that anything but this very run occupies. Changes nothing.

        Args:
            identity: what the bytes of the artifacts depend on.
            force: consider the directory free.

        Raises:
            RunError: the directory holds shards, another run, finished or not, artifacts of unknown origin, or this very run
                without all of its artifacts.
            ConfigError: its manifest.json is another program's, or `partials/` is a directory of shards or of a finished run.
        """
        for dpath in (self.dpath, *self.dpath.parents):
            if os.path.isfile(dpath):
                raise RunError(f"{dpath} is a file; --out takes a directory to make, or that of an earlier run.")
        if os.path.lexists(self.dpath / "metadata.json"):
            raise RunError(f"{self.dpath} holds metadata.json: it is a directory of shards. Choose another --out.")
        if self._is_foreign():
            raise ConfigError(f"{self.manifest_fpath} is not that of a run of saev-dist. Choose another --out.")
        for name in () if self._has_begun() else ("metadata.json", "manifest.json"):
            if os.path.lexists(self.partials_dpath / name):
                raise ConfigError(f"{self.partials_dpath} holds {name}: it is not of a run under way. Choose another --out.")
        if force:
            return
        under_way = self.under_way()
        holder = under_way or self.manifest()
        if holder is None:
            if strangers := self.artifacts():
                raise RunError(
                    f"{self.dpath} holds {strangers[0].name} but no manifest.json: artifacts of something else. "
                    "Choose another --out, or replace them with --force."
                )
            return
        theirs = holder.get("identity", dict)
        if names := differing(identity, theirs):
            pairs = {name: contrast(theirs.get(name), identity.get(name)) for name in names}
            details = "; ".join(f"{name}: there {there}, here {here}" for name, (there, here) in pairs.items())
            state = "an unfinished run" if under_way else "a run"
            raise RunError(
                f"{self.dpath} holds {state} with other settings ({details}). Choose another --out, or replace it with --force."
            )
        if under_way is None:
            refuse_lacking(self.dpath, holder)

    def begin(self, identity: dict[str, Any], note: dict[str, Any], *, afresh: bool) -> dict[str, Any] | None:
        """Note what is under way here, or what is not noted yet of it. The lock must be held.

        Args:
            identity: what the bytes of the artifacts depend on.
            note: what a later attempt, `merge` and the launcher want to know besides; JSON. It stays as the run began, but
                for a `self_check` that is not None.
            afresh: forget an unfinished attempt, if there is one.

        Returns:
            The identity that the run began with: it may know shards that cannot be read now. None: another process has
            finished the run since `is_finished` looked.

        Raises:
            RunError: another process has begun a run with other settings, there is work of a run that nothing tells of, or the
                directory cannot be written.
        """
        with writing(self.partials_dpath):
            self.refuse_others(identity, force=afresh)
            if not afresh and self.is_finished():
                return None
            under_way = None if afresh else self.under_way()
            if under_way is None:
                if not afresh:
                    self.refuse_orphans()
                self._clear()
            noted = under_way.obj if under_way else {}
            content = {"identity": identity} | note | noted
            if note.get("self_check") is not None:  # the attempt that began the run may not have looked
                content["self_check"] = note["self_check"]
            if content != noted:
                self.stage_json("run.json.new", content)
                os.replace(self.partials_dpath / "run.json.new", self.partials_dpath / "run.json")
                fsync_dir(self.partials_dpath)
        begun: dict[str, Any] = content["identity"]
        return begun

    def refuse_orphans(self) -> None:
        """Raise RunError where there are partials and nothing that tells of what run: no run.json, and no manifest.json,
        beside which they mean nothing."""
        if self.under_way() or self.manifest():
            return
        if n_orphans := len(list(self.partials_dpath.glob("*.partial"))):
            raise RunError(
                f"{self.partials_dpath / 'run.json'} is missing, so nobody can tell what run the {n_orphans:,} files *.partial "
                "beside it are of (a --force may have been interrupted). Put it back, or start over with extract --force."
            )

    @contextmanager
    def stage(self, name: str, *, onto: Path | None = None) -> Iterator[BinaryIO]:
        """A file to write an artifact to, under `partials/`; on return it is on the disk, or gone on failure.

        Args:
            onto: a file to begin with, which this process alone writes. It becomes the artifact's under a second name, so
                that nothing is copied; where the file system knows no second names the artifact begins empty.
        """
        fpath = self.partials_dpath / name
        with writing(fpath):
            fpath.unlink(missing_ok=True)  # of a process that was killed: maybe a second name of rows that count
            mode: Literal["r+b", "xb"] = "r+b" if onto is not None and _link(onto, fpath) else "xb"
            n_before: int | None = None
            try:
                with open(fpath, mode) as file:
                    n_before = os.fstat(file.fileno()).st_size
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                if n_before is not None:
                    with suppress(OSError):
                        os.truncate(fpath, n_before)  # a full disk gets back what cannot be used
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
        """Rename staged artifacts into place, then the manifest, which lists their sizes; remove `partials/`."""
        with writing(self.partials_dpath):
            sizes = {name: (self.partials_dpath / name).stat().st_size for name in names}
        self.stage_json("manifest.json", manifest | {"artifacts": sizes})
        with writing(self.dpath):
            # From here to the new manifest the old artifacts are being replaced: run.json says so, not a manifest.
            self.manifest_fpath.unlink(missing_ok=True)
            for stale in self.artifacts():
                if stale.name not in names:
                    stale.unlink()
            for name in names:
                os.replace(self.partials_dpath / name, self.dpath / name)
            fsync_dir(self.dpath)
            os.replace(self.partials_dpath / "manifest.json", self.manifest_fpath)
            fsync_dir(self.dpath)
            (self.partials_dpath / "run.json").unlink(missing_ok=True)
        with suppress(OSError):  # the run is finished; what stays means nothing, and the next command removes it
            self._clear()

    def tidy(self) -> None:
        """Remove what a run that died in its last instant left beside its artifacts, if that can be done."""
        if self.partials_dpath.exists():
            with suppress(OSError, RunError), self.lock.hold():
                if not self.under_way():  # begun since, by another process
                    self._clear()

    def _clear(self) -> None:
        """Remove what a run wrote under `partials/`, and not the lock: without run.json the rest means nothing."""
        for name in ("manifest.json", "run.json"):  # in this order: alone the former would be another program's
            (self.partials_dpath / name).unlink(missing_ok=True)
        for fpath in self._work():
            fpath.unlink(missing_ok=True)  # a rank that was given up may still be at work

    def _work(self) -> list[Path]:
        """Files of a run under `partials/`, but for the lock."""
        return [fpath for pattern in UNDER_WAY_PATTERNS for fpath in self.partials_dpath.glob(pattern)]

    def load_tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An artifact that is one tensor of this shape.

        Raises:
            RunError: it is missing, damaged, or of another shape or type.
        """
        fpath = self.dpath / name
        tensor = self._load(fpath)
        dtype = torch.int64 if name in ("top_img_i.pt", "top_patch_i.pt") else torch.float32
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise RunError(
                f"{fpath} holds {found}; the manifest promises a tensor {shape} of {dtype}. Run extract again with --force."
            )
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
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  # torch lets through whatever a damaged byte sets off
            raise RunError(f"{fpath} is damaged; run extract again with --force.") from None


def _link(fpath: Path, second: Path) -> bool:
    """Give a file a second name; whether it has that. (On NFS the answer to a link that was made may be lost.)"""
    with suppress(OSError):
        os.link(fpath, second)
    with suppress(OSError):
        return os.path.samefile(fpath, second)
    return False


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
        content = retrying(fpath.read_bytes)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise RunError(f"{fpath}: cannot read: {err.strerror or err}; make it readable, then run again.") from None
    try:
        return Fields.parse(content, str(fpath), RunError)
    except RunError as err:
        raise DamagedError(f"{str(err).rstrip('.')}: damaged. Run extract again with --force, which starts over.") from None
