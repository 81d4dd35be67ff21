"""Any SAE: which format a path holds, told by its content, and what the user says that the file cannot.

To add a format: a file with `load(path) -> Sae` and its rules in the docstring, a line in `FORMATS`, and
the name in `config.SaeRules.sae_format`.
"""

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saev_dist.config import SaeRules
from saev_dist.data.shards import Shards
from saev_dist.errors import CheckpointError, ConfigError, UnknownFormatError
from saev_dist.fields import Fields
from saev_dist.sae import dictionary_learning, hub, plain, sae_lens, saev, sparsify
from saev_dist.sae.checkpoint import check_k, file_in, load_torch, take
from saev_dist.sae.model import TOKEN_NORMS, Given, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.sae.safetensors import read_header, read_safetensors

MOST_LOOKED_INTO = 100
"""Files of a directory that is no SAE, for one that is."""


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint."""

    load: Callable[[Path], Sae]
    files: tuple[str, ...] = ()
    """Files of a directory that hold the SAE; none: it is one file."""
    besides: tuple[str, ...] = ()
    """Files that may be there too, and say what those leave out."""


FORMATS = {
    "saev": Format(saev.load_saev),
    "plain": Format(plain.load),
    "sae_lens": Format(sae_lens.load, (sae_lens.CONFIG, sae_lens.WEIGHTS), (sae_lens.SCALER,)),
    "sparsify": Format(sparsify.load, (sparsify.CONFIG, sparsify.WEIGHTS)),
    "dictionary_learning": Format(dictionary_learning.load, (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS)),
}


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What the user says about an SAE, against its file or beyond it. None: as the file says."""

    sae_format: str | None = None
    pre_bias: bool | None = None
    activation: str | None = None
    """relu, or topk:K."""
    threshold: float | None = None
    input_norm: str | None = None
    input_scale: float | None = None
    input_mean: bytes | None = None
    """float32, little-endian."""

    @classmethod
    def of(cls, rules: SaeRules) -> "Overrides":
        """From the flags."""
        mean = _read_mean(rules.input_mean).numpy().astype("<f4").tobytes() if rules.input_mean else None
        said = {name: getattr(rules, name) for name in cls.__dataclass_fields__}
        return cls(**said | {"sae_format": None if rules.sae_format == "auto" else rules.sae_format, "input_mean": mean})

    def to_json(self) -> dict[str, Any]:
        """What was said, for the manifest; `from_json` reads it back."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        if self.input_mean is not None:
            said["input_mean"] = base64.b64encode(self.input_mean).decode()
        return said

    @classmethod
    def from_json(cls, fields: Fields) -> "Overrides":
        """From a manifest."""
        fields.refuse_unknown(cls.__dataclass_fields__)
        kinds = {"pre_bias": bool, "threshold": float, "input_scale": float}
        said: dict[str, Any] = {name: fields.get(name, kinds.get(name, str)) for name in fields.obj}
        if "input_mean" in said:
            try:
                said["input_mean"] = np.frombuffer(base64.b64decode(said["input_mean"]), "<f4").tobytes()
            except ValueError:
                raise fields.error(f"{fields.where}: input_mean is damaged; run extract again with --force.") from None
        return cls(**said)

    def apply(self, sae: Sae, path: Path) -> Sae:
        """`sae` under these rules.

        Raises:
            ConfigError: they contradict the file, each other, or leave out what it needs.
        """
        if sae.missing == "--input-scale" and self.input_scale is None and self.input_norm is None:
            raise ConfigError(
                f"{path} ({sae.source}) leaves out a number that its encoder needs; give it with --input-scale. "
                "For a scale that was folded into the weights already that is 1, or --input-norm none."
            )
        if sae.missing == "--threshold" and self.threshold is None and self.activation is None:
            raise ConfigError(
                f"{path} ({sae.source}) holds no threshold; give the one of its training with --threshold, "
                "or --activation topk:K with its K, which is how its program encoded such files."
            )
        sae = replace(sae, missing="", pre_bias=sae.pre_bias if self.pre_bias is None else self.pre_bias)
        if self.activation is not None:
            if self.threshold is not None or not isinstance(sae.activation, Relu | TopK | Threshold):
                what = "--threshold" if self.threshold is not None else f"a {sae.activation.name} SAE"
                raise ConfigError(f"--activation {self.activation} does not go with {what}; leave --activation out.")
            activation = _parse_activation(self.activation, sae.d_sae)
            if isinstance(activation, TopK):
                relu = sae.activation.relu if isinstance(sae.activation, TopK) else sae.relu_of_top_k
                activation = replace(activation, relu=relu)
            sae = replace(sae, activation=activation)
        if self.threshold is not None:
            if not isinstance(sae.activation, Threshold):
                raise ConfigError(f"--threshold is for BatchTopK and JumpReLU; {path} is {sae.source}. Leave it out.")
            sae = replace(sae, activation=Threshold(self.threshold))
        if self.input_norm is not None:
            sae = replace(sae, input_norm=TOKEN_NORMS[self.input_norm])
        if self.input_scale is not None or self.input_mean is not None:
            file_norm = Given(torch.zeros(sae.d_model), 1.0) if sae.input_norm is None else sae.input_norm
            if not isinstance(file_norm, Given):
                raise ConfigError(
                    f"--input-mean and --input-scale do not go with input_norm {file_norm.name} ({path}); "
                    "add --input-norm none if the file is wrong."
                )
            mean_d = file_norm.mean_d
            if self.input_mean is not None:
                mean_d = torch.from_numpy(np.frombuffer(self.input_mean, "<f4").copy())
            if mean_d.shape != (sae.d_model,):
                raise ConfigError(
                    f"--input-mean holds {len(mean_d):,} numbers; {path} takes activations of width {sae.d_model:,}."
                )
            sae = replace(sae, input_norm=Given(mean_d, file_norm.scale if self.input_scale is None else self.input_scale))
        if isinstance(sae.input_norm, LayerNorm) and sae.d_model == 1:
            raise ConfigError(f"{path} takes activations of width 1, which layer_norm cannot normalise. Use --input-norm none.")
        return sae


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """An SAE, and where it came from."""

    sae: Sae
    path: Path
    """File or directory on this machine."""
    sae_format: str
    sha256: str

    def identity(self) -> dict[str, Any]:
        """What the codes depend on besides the activations; JSON, one member a rule."""
        mean_d = self.sae.input_norm.mean_d if isinstance(self.sae.input_norm, Given) else None
        mean = None if mean_d is None else hashlib.sha256(mean_d.numpy().astype("<f4").tobytes()).hexdigest()
        rules = self.sae.rules() | {"sha256": self.sha256, "input_mean_sha256": mean}
        return {f"sae_{name}": value for name, value in rules.items()}

    def check_width(self, shards: Shards) -> None:
        """Raise ConfigError unless the SAE takes activations of these shards' width."""
        if self.sae.d_model != shards.d_model:
            raise ConfigError(
                f"{self.path} takes activations of width {self.sae.d_model}; {shards.dpath} holds width {shards.d_model}. "
                "Use the SAE that was trained on this model's activations."
            )


def load_sae(name: Path, overrides: Overrides) -> Loaded:
    """Read the SAE at a path, or at `hf://owner/repo[/path][@revision]`.

    Raises:
        CheckpointError: it is of no known format, or not sound.
        ConfigError: the overrides do not fit it, or the Hub cannot be asked.
    """
    hub.refuse_link(name)
    path = hub.fetch(name, file_names()) if hub.is_hub_name(name) else name
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # a pipe would be waited for
        raise CheckpointError(f"{path} is neither a file nor a directory; name the file or directory that the SAE is in.")
    sae_format = overrides.sae_format or recognise(path)
    sae = overrides.apply(FORMATS[sae_format].load(path), path)
    return Loaded(sae=sae, path=path, sae_format=sae_format, sha256=fingerprint(path, sae_format))


def recognise(path: Path) -> str:
    """The format of a checkpoint.

    Raises:
        CheckpointError: it is none, or could be several.
    """
    try:
        if path.is_dir():
            return _recognise_directory(path)
        with open(path, "rb") as file:
            first = file.read(1)
        if first == b"{" and path.name not in file_names():
            return "saev"
        if (found := read_header(path)) is not None and plain.recognises(found[0]):
            return "plain"
    except OSError as err:
        elsewhere = "; hf://owner/repo is one on the Hub" if isinstance(err, FileNotFoundError) else ""
        raise CheckpointError(f"{path}: {err.strerror}; an SAE should be there, a file or a directory{elsewhere}.") from None
    hint = "; name the directory that it is in" if path.name in file_names() else ""
    raise CheckpointError(f"{path} is no SAE by itself{hint}. An SAE is one of {_known()}.")


def fingerprint(path: Path, sae_format: str) -> str:
    """SHA-256 of a file; of a directory's files, that of their names and their SHA-256."""
    files = FORMATS[sae_format].files
    if not files:
        return _sha256(path)
    return hashlib.sha256("".join(f"{name} {_sha256(file_in(path, name))}\n" for name in files).encode()).hexdigest()


def _recognise_directory(dpath: Path) -> str:
    found = [name for name, kind in FORMATS.items() if kind.files and all((dpath / file).exists() for file in kind.files)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{dpath} holds the files of {' and '.join(found)}; say which with --sae-format.")
    if (dpath / "metadata.json").exists():
        raise CheckpointError(f"{dpath} is a directory of shards; give it to --shards, and an SAE to --sae.")
    names = sorted(fpath.name for fpath in dpath.iterdir())
    held = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    within = [name for name in names if _is_sae(dpath / name)] if len(names) <= MOST_LOOKED_INTO else []
    if len(within) == 1:
        raise CheckpointError(f"{dpath} is no SAE by itself; it holds {held}. Did you mean {dpath / within[0]}?")
    raise UnknownFormatError(f"{dpath} is no SAE by itself; it holds {held or 'nothing'}. An SAE is one of {_known()}.")


def _is_sae(path: Path) -> bool:
    """Whether a file is one by itself, or a directory holds one format's files."""
    if os.path.isdir(path):  # unlike Path's methods, os.path's answer False also where one may not look
        return any(kind.files and all(os.path.exists(path / file) for file in kind.files) for kind in FORMATS.values())
    try:
        if not os.path.isfile(path):
            return False
        if recognise(path) != "saev":
            return True
        with open(path, "rb") as file:  # a line of JSON, then what torch.save writes; other JSON begins so, too
            file.readline(saev.MAX_HEADER_BYTES)
            return file.read(2) in (b"PK", b"\x80\x02")
    except (CheckpointError, OSError):
        return False


def _known() -> str:
    return "; ".join(f"{name} ({' + '.join(kind.files) or 'one file'})" for name, kind in FORMATS.items())


def file_names() -> set[str]:
    """Of all files by which a directory is known for an SAE, or which complete one."""
    return {file for kind in FORMATS.values() for file in (*kind.files, *kind.besides)}


def _parse_activation(text: str, d_sae: int) -> Relu | TopK:
    name, _, k = text.partition(":")
    if text == "relu":
        return Relu()
    if name != "topk" or not k.isdecimal() or len(k) > 9 or int(k) < 1:
        raise ConfigError(f"--activation is {text!r}; it is relu, or topk:K with the K of training, such as topk:32.")
    return TopK(check_k("--activation", int(k), d_sae))


def _read_mean(fpath: Path) -> Tensor:
    """The vector in a .npy file, in a safetensors file with one tensor, or that `torch.save` wrote."""
    try:
        with open(fpath, "rb") as file:
            body = file.read(64 * 1024 * 1024)
        if body.startswith(b"\x93NUMPY"):
            # mapped: a size that the file has not got takes no memory
            array = np.load(fpath, mmap_mode="r", allow_pickle=False)
            mean = torch.from_numpy(array.astype(np.float64, casting="same_kind"))
        elif read_header(fpath) is not None:
            tensors = read_safetensors(fpath)[0]
            if len(tensors) != 1:
                raise ConfigError(f"{fpath} holds {len(tensors)} tensors; --input-mean takes a file with one vector.")
            (mean,) = tensors.values()
        else:
            mean = load_torch(fpath, body)
    except OSError as err:
        raise ConfigError(f"{fpath}: {err.strerror}; --input-mean takes a file with a vector.") from None
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError, TokenError) as err:
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise ConfigError(f"{fpath}: {first}; --input-mean takes a file with one vector.") from None
    if not isinstance(mean, Tensor) or mean.dim() != 1:
        raise ConfigError(f"{fpath} holds no vector; --input-mean takes a .npy, .pt or .safetensors file with one.")
    return take(fpath, {"mean": mean}, {"mean": (len(mean),)}, "--input-mean")["mean"]


def _sha256(fpath: Path) -> str:
    try:
        with open(fpath, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise CheckpointError(f"{fpath}: cannot read: {err.strerror or err}.") from None
