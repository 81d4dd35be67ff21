"""Activation shards as saev stores them: reading their description, checking the files, writing new ones.

A directory holds `metadata.json`, `shards.json` and the shard files. A shard is raw little-endian float32,
C order, `(examples, layers, tokens, d_model)`; token 0 is CLS where `cls_token` is true and the content
tokens (patches) follow. Protocols 1.0.0 and 1.1 differ from 2.1 in names only.
Source: saev's `activations.py` (1.x) and `saev/data/shards.py` (2.1).
"""

import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, SupportsIndex

from saev_dist.errors import ConfigError, DataError
from saev_dist.fields import Fields, parse_json
from saev_dist.files import did_you_mean, replacing, retrying

if TYPE_CHECKING:  # only the writer needs NumPy; the launcher, which reads a description, should not wait for it
    from numpy.typing import ArrayLike

PROTOCOLS = ("1.0.0", "1.1", "2.1")
FLOAT_BYTES = 4
N_PROBES = 8
PROBE_BYTES = 4096
DIRECTORY_HINT = "a shard directory holds metadata.json, shards.json and the shards"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """One layer of a shard directory."""

    dpath: Path
    protocol: str
    family: str
    """Model family, such as clip or dinov3: decides how pictures were prepared."""
    ckpt: str
    layers: tuple[int, ...]
    layer: int
    """The wanted one; a value out of `layers`, not a position."""
    n_patches: int
    """Content tokens per example, CLS excluded."""
    cls_token: bool
    d_model: int
    names: tuple[str, ...]
    examples: tuple[int, ...]
    """Examples in each shard."""
    dataset: str | None
    """Where the pictures were, where the metadata says so in plain text."""

    @classmethod
    def open(cls, dpath: Path, layer: int | None = None) -> Self:
        """Read and check `metadata.json` and `shards.json`; the shard files themselves are left to `check_files`.

        Raises:
            DataError: something is missing, malformed or contradictory.
            ConfigError: `layer` is not there, or is needed because there are several.
        """
        fpath = dpath / "metadata.json"
        if not os.path.isdir(dpath):  # unlike Path.is_dir, False also where one may not look
            raise DataError(f"{dpath} is not a directory; --shards takes the folder that holds metadata.json.")
        md = Fields.parse(_read(fpath), str(fpath), DataError)
        protocol = md.get("protocol", str)
        if protocol not in PROTOCOLS:
            raise DataError(f"{fpath}: protocol is {protocol!r}; this version reads {', '.join(PROTOCOLS)}.")
        dtype = md.get("dtype", str)
        if dtype != "float32":
            raise DataError(f"{fpath}: dtype is {dtype!r}; shards are read as float32 only.")
        layers = _layers(md)
        names, examples = _read_shard_list(dpath / "shards.json")
        n_examples = md.positive("n_examples", "n_imgs")
        if sum(examples) != n_examples:
            raise DataError(
                f"{dpath / 'shards.json'} adds up to {sum(examples):,} examples; metadata.json promises {n_examples:,}. "
                "One of them is stale: write the shards again, or correct the counts."
            )
        return cls(
            dpath=dpath,
            protocol=protocol,
            family=md.get(("family", "vit_family"), str),
            ckpt=md.get(("ckpt", "vit_ckpt"), str),
            layers=tuple(layers),
            layer=_pick_layer(layer, layers, dpath),
            n_patches=md.positive("content_tokens_per_example", "n_patches_per_img"),
            cls_token=md.get("cls_token", bool),
            d_model=md.positive("d_model", "d_vit"),
            names=names,
            examples=examples,
            dataset=_dataset(md),
        )

    @property
    def n_examples(self) -> int:
        return sum(self.examples)

    @property
    def n_tokens(self) -> int:
        """Content tokens of the layer in all shards."""
        return self.n_examples * self.n_patches

    @property
    def content_bytes(self) -> int:
        """Bytes of one example's content tokens in the layer, which are contiguous."""
        return self.n_patches * self.d_model * FLOAT_BYTES

    @property
    def example_bytes(self) -> int:
        """Bytes of one example with all its layers and CLS tokens."""
        return len(self.layers) * (self.n_patches + self.cls_token) * self.d_model * FLOAT_BYTES

    def content_offset(self, example_i: int) -> int:
        """Byte in a shard at which the content tokens of its example `example_i` start."""
        layer_bytes = self.example_bytes // len(self.layers)
        skipped = self.layers.index(self.layer) * layer_bytes + self.cls_token * self.d_model * FLOAT_BYTES
        return example_i * self.example_bytes + skipped

    def check_files(self) -> None:
        """Check that every shard is there and long enough; a longer one (zero-padded) is fine.

        Raises:
            DataError: one is not.
        """
        for fault in self.bad_files().values():
            raise DataError(f"{fault}. Write the shard again, or leave it out with extract --skip-bad-shards.")

    def bad_files(self) -> dict[int, str]:
        """What is wrong with the shards that are missing or too short, by their position."""
        faults = {}
        for shard_i, (name, n_examples) in enumerate(zip(self.names, self.examples, strict=True)):
            fpath = self.dpath / name
            try:
                n_bytes = retrying(fpath.stat).st_size
            except OSError as err:
                faults[shard_i] = f"{fpath}: {err.strerror}; shards.json lists it with {n_examples} examples"
                continue
            if n_bytes < n_examples * self.example_bytes:
                faults[shard_i] = (
                    f"{fpath} holds {n_bytes:,} bytes; shards.json promises {n_examples} examples × "
                    f"{len(self.layers)} layers × {self.n_patches + self.cls_token} tokens × {self.d_model} floats = "
                    f"{n_examples * self.example_bytes:,}"
                )
        return faults

    def fingerprint(self) -> str:
        """SHA-256 of what the reader uses beside the content: the description and the shard list."""
        described = [self.protocol, self.family, self.ckpt, list(self.layers), self.layer, self.n_patches]
        described += [self.cls_token, self.d_model, list(self.names), list(self.examples)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def probes(self, *, skip_bad: bool = False) -> list[str | None]:
        """SHA-256 of the first 4 KiB of up to eight shards, evenly spread; None for one that is too short.

        Hashing terabytes would take hours. This is enough to tell other activations of the same shape apart, not to
        find one bad byte.

        Args:
            skip_bad: None also for one that cannot be read.

        Raises:
            DataError: one cannot be read.
        """
        step = -(-len(self.names) // N_PROBES)
        probes: list[str | None] = []
        for name, n_examples in list(zip(self.names, self.examples, strict=True))[::step]:
            try:
                content = _read(self.dpath / name, PROBE_BYTES, "repair it, or leave it out with extract --skip-bad-shards")
            except DataError:
                if not skip_bad:
                    raise
                content = b""
            whole = len(content) >= min(PROBE_BYTES, n_examples * self.example_bytes)
            probes.append(hashlib.sha256(content).hexdigest() if whole else None)
        return probes


def _dataset(md: Fields) -> str | None:
    """Where the pictures were: `dataset` (2.1), or the root that plain JSON in `data` names (1.x, and our writer)."""
    data = md.obj.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return md.get("dataset", str, "") or (root if isinstance(root, str) and root else None)


def read_layers(dpath: Path) -> list[int]:
    """The layers that a shard directory holds."""
    fpath = dpath / "metadata.json"
    return _layers(Fields.parse(_read(fpath), str(fpath), DataError))


def _layers(md: Fields) -> list[int]:
    layers = md.get("layers", list)
    if not layers or any(type(value) is not int for value in layers) or len(set(layers)) != len(layers):
        raise DataError(f"{md.where}: layers is {json.dumps(layers)[:80]}; it should be a list of distinct integers.")
    return layers


def _read(fpath: Path, n_bytes: int = -1, hint: str = DIRECTORY_HINT) -> bytes:
    def read() -> bytes:
        with open(fpath, "rb") as file:
            return file.read(n_bytes)

    try:
        return retrying(read)
    except OSError as err:
        nearby = did_you_mean(fpath.parent, fpath.name) if hint == DIRECTORY_HINT else ""
        raise DataError(f"{fpath}: {err.strerror}; {hint}.{nearby}") from None


def _read_shard_list(fpath: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and example counts from `shards.json`."""
    entries = parse_json(_read(fpath), str(fpath), DataError)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{fpath} should be a non-empty list of shards.")
    names: list[str] = []
    examples: list[int] = []
    for i, entry in enumerate(entries):
        fields = Fields(entry, f"{fpath}, entry {i}", DataError)
        name = fields.get("name", str)
        if name in ("", ".", "..") or any(char in name for char in "/\\") or not name.isprintable():
            raise DataError(f"{fpath}, entry {i}: name is {name!r}; it should be a plain file name in this directory.")
        n_examples = fields.obj.get("n_examples", fields.obj.get("n_imgs"))
        if type(n_examples) is int and n_examples == 0:  # saev's writer ends with one where its shards have come out even
            continue
        names.append(name)
        examples.append(fields.positive("n_examples", "n_imgs"))
    if not names:
        raise DataError(f"{fpath} lists only shards of no images; expected at least one with some. Write the shards again.")
    if len(set(names)) != len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise DataError(f"{fpath} lists {twice} more than once.")
    return tuple(names), tuple(examples)


def _pick_layer(layer: int | None, layers: Sequence[int], dpath: Path) -> int:
    listed = ", ".join(map(str, layers))
    if layer is None:
        if len(layers) > 1:
            raise ConfigError(f"{dpath} holds layers {listed}; choose one with --layer.")
        return layers[0]
    if layer not in layers:
        raise ConfigError(f"{dpath} holds no layer {layer}; it holds {listed}.")
    return layer


def _whole(name: str, value: SupportsIndex, *, least: int = 1) -> int:
    """A number of any integer type, NumPy's too."""
    number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else least - 1
    if number < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}.")
    return number


class ShardWriter:
    """Write a shard directory of protocol 2.1; `metadata.json` comes last, so a reader never sees half of one.

    Args:
        dpath: directory to make; it must not hold a metadata.json yet.
        family, ckpt: model that computed the activations.
        layers: layer numbers, in the order of the arrays.
        content_tokens_per_example: patches per image, CLS excluded.
        d_model: activation width.
        cls_token: whether token 0 of each example is CLS.
        max_tokens_per_shard: budget, counted over layers and CLS tokens as saev does.
        dataset: folder of the pictures.
        data: plain JSON about the data set. (saev stores a pickle here, which nothing of ours writes or reads.)

    Raises:
        ConfigError: an argument is not that.
        DataError: on entering, the directory holds shards; on leaving, nothing was written, or a write had failed.
    """

    def __init__(
        self,
        dpath: Path | str,
        *,
        family: str,
        ckpt: str,
        layers: Sequence[int],
        content_tokens_per_example: int,
        d_model: int,
        cls_token: bool,
        max_tokens_per_shard: int,
        dataset: Path | str = "",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.dpath = Path(dpath)
        content_tokens_per_example = _whole("content_tokens_per_example", content_tokens_per_example)
        d_model, max_tokens_per_shard = _whole("d_model", d_model), _whole("max_tokens_per_shard", max_tokens_per_shard)
        layers = [_whole("a layer", value, least=-(2**31)) for value in layers]
        if not layers or len(set(layers)) != len(layers):
            raise ConfigError(f"layers is {layers}; expected one number or more, all different.")
        self.n_tokens = content_tokens_per_example + bool(cls_token)
        self.examples_per_shard = max_tokens_per_shard // (self.n_tokens * len(layers))
        if self.examples_per_shard < 1:
            raise ConfigError(
                f"max_tokens_per_shard is {max_tokens_per_shard}; one example takes {self.n_tokens * len(layers)}."
            )
        self.metadata: dict[str, Any] = {
            "family": str(family),
            "ckpt": str(ckpt),
            "layers": layers,
            "content_tokens_per_example": content_tokens_per_example,
            "cls_token": bool(cls_token),
            "d_model": d_model,
            "n_examples": 0,
            "max_tokens_per_shard": max_tokens_per_shard,
            "data": dict(data or {}),
            "dataset": str(dataset or ""),
            "pixel_agg": "majority",
            "dtype": "float32",
            "protocol": "2.1",
        }
        try:
            json.dumps(self.metadata)
        except (TypeError, ValueError) as err:
            raise ConfigError(f"data is no plain JSON: {err}.") from None
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._state: Literal["shut", "open", "failed"] = "shut"

    def __enter__(self) -> Self:
        self.dpath.mkdir(parents=True, exist_ok=True)
        if (self.dpath / "metadata.json").exists():
            raise DataError(f"{self.dpath} already holds shards; write to an empty directory.")
        self._state = "open"
        return self

    def write(self, acts_eltd: "ArrayLike") -> None:
        """Append examples.

        Args:
            acts_eltd: (examples, layers, tokens, d_model), written as float32; a tensor, or a NumPy array or what it makes one
                of.

        Raises:
            DataError: it has another shape, or holds no real numbers; or a write before failed, or this one is not within the
                `with`.
        """
        import numpy as np

        if self._state == "shut":
            raise DataError(f"{self.dpath}: the writer is not open: write inside `with ShardWriter(…) as writer`.")
        self._refuse_failed()
        if hasattr(acts_eltd, "detach"):  # a tensor, maybe on a GPU, or of a type that NumPy lacks
            tensor: Any = acts_eltd
            acts_eltd = tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
        expected = (len(self.metadata["layers"]), self.n_tokens, self.metadata["d_model"])
        left_eltd = np.asarray(acts_eltd)
        if left_eltd.ndim != 4 or left_eltd.shape[1:] != expected:
            raise DataError(
                f"{self.dpath}: activations have the shape {left_eltd.shape}; expected (examples, {expected[0]} layers, "
                f"{expected[1]} tokens, d_model {expected[2]})."
            )
        if left_eltd.dtype.kind not in "fiub":
            raise DataError(f"{self.dpath}: activations are of the type {left_eltd.dtype}; expected real numbers.")
        self._state = "failed"
        while len(left_eltd):
            if self._file is None:
                name = f"acts{len(self.shards):06d}.bin"
                self._file = open(self.dpath / name, "wb")
                self.shards.append({"name": name, "n_examples": 0})
            room = self.examples_per_shard - self.shards[-1]["n_examples"]
            part, left_eltd = left_eltd[:room], left_eltd[room:]
            self._file.write(part.astype("<f4", order="C", copy=False).data)
            self.shards[-1]["n_examples"] += len(part)
            self.metadata["n_examples"] += len(part)
            if len(part) == room:
                self._file.close()
                self._file = None
        self._state = "open"

    def _refuse_failed(self) -> None:
        """An image that is there in part would shift all that follow."""
        if self._state == "failed":
            raise DataError(
                f"{self.dpath}: a write failed before, so the shards are not whole. Write all to an empty directory."
            )

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if kind is None:
            self._refuse_failed()
            if not self.metadata["n_examples"]:
                raise DataError(f"{self.dpath}: no examples were written.")
            self._state = "shut"
            (self.dpath / "shards.json").write_text(json.dumps(self.shards, indent=2))
            with replacing(self.dpath / "metadata.json") as file:
                file.write(json.dumps(self.metadata, indent=2).encode())
