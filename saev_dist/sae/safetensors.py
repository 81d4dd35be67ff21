"""The safetensors container: named tensors behind a JSON header. Nothing in it can be executed.

8 bytes: length of the header, little-endian uint64. Then the header: JSON, of each tensor its dtype, shape and place in
the bytes that follow, and under `__metadata__` texts. The tensors fill the bytes without gaps or overlaps.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saev_dist.errors import CheckpointError
from saev_dist.fields import MAX_INTEGER, Fields
from saev_dist.files import replacing

MAX_HEADER_BYTES = 1024 * 1024  # an SAE has a dozen tensors; the format allows 100 MB
METADATA = "__metadata__"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(fpath: Path) -> tuple[Fields, int] | None:
    """The header and the byte at which the tensors start; None where the file does not begin as a safetensors file does.

    Raises:
        CheckpointError: the file cannot be read, or its header is damaged.
        OSError: the file cannot be read.
    """
    with open(fpath, "rb") as file:
        start = file.read(9)
        if len(start) < 9 or start[8:] != b"{":
            return None
        (n_bytes,) = struct.unpack("<Q", start[:8])
        if n_bytes > min(MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
            raise CheckpointError(
                f"{fpath}: its header claims {n_bytes:,} bytes; the file has {os.fstat(file.fileno()).st_size:,}, and "
                f"{MAX_HEADER_BYTES:,} is the most for an SAE. The file is damaged, or no safetensors file."
            )
        text = start[8:] + file.read(n_bytes - 1)
    return Fields.parse(text, f"{fpath}, header", CheckpointError), 8 + n_bytes


def read_safetensors(fpath: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, in their own dtypes, and the metadata. Memory: the file's size.

    Raises:
        CheckpointError: the file is not what the format promises.
        OSError: the file cannot be read.
    """
    if (found := read_header(fpath)) is None:
        raise CheckpointError(f"{fpath} is not a safetensors file: it does not begin with a length and a JSON header.")
    header, start = found
    metadata = {str(name): text for name, text in header.get(METADATA, dict, {}).items() if isinstance(text, str)}
    places = {name: _place(header, name) for name in header.obj if name != METADATA}
    position = 0
    for name, (_, _, first, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if first != position:
            raise CheckpointError(f"{fpath}: tensor {name} starts at byte {first:,}; the one before it ends at {position:,}.")
        position = stop
    n_bytes = fpath.stat().st_size - start
    if position != n_bytes:
        raise CheckpointError(
            f"{fpath}: its tensors take {position:,} bytes; the file has {n_bytes:,}. It is truncated or damaged."
        )
    tensors = {}
    with open(fpath, "rb") as file:
        for name, (dtype, shape, first, stop) in places.items():
            raw = torch.empty(stop - first, dtype=torch.uint8)
            file.seek(start + first)
            if file.readinto(raw.numpy().data) != stop - first:
                raise CheckpointError(f"{fpath} became shorter while it was read.")
            tensors[name] = raw.view(dtype).view(shape)
    return tensors, metadata


def write_safetensors(fpath: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors and texts; the file has its name only once it is whole."""
    header: dict[str, Any] = {METADATA: dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        stop = position + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with replacing(fpath, durable=True) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().data)


def _place(header: Fields, name: str) -> tuple[torch.dtype, list[int], int, int]:
    """Dtype, shape, first and last byte of a tensor, checked against each other."""
    entry = header.sub(name)
    dtype, shape, place = entry.get("dtype", str), entry.get("shape", list), entry.get("data_offsets", list)
    if dtype not in DTYPES:
        raise CheckpointError(f"{entry.where}: dtype is {dtype!r}; the tensors of an SAE are {', '.join(DTYPES)}.")
    if len(place) != 2 or not all(type(n) is int and 0 <= n <= MAX_INTEGER for n in [*shape, *place]) or len(shape) > 8:
        raise CheckpointError(f"{entry.where}: shape {str(shape)[:80]} or data_offsets {str(place)[:80]} are not sane.")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if place[1] - place[0] != n_bytes:
        raise CheckpointError(
            f"{entry.where}: {dtype} {shape} takes {n_bytes:,} bytes; its data_offsets {place} hold {place[1] - place[0]:,}."
        )
    return DTYPES[dtype], shape, place[0], place[1]
