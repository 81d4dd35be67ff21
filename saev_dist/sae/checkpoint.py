"""What the loaders of all formats share: reading files of strangers, and checking tensors.

Names: `d` model width, `s` features.
"""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saev_dist.errors import CheckpointError, SaevDistError
from saev_dist.fields import Fields
from saev_dist.machine import memory_wanted
from saev_dist.sae.model import Gated
from saev_dist.sae.safetensors import read_safetensors

MAX_JSON_BYTES = 1024 * 1024

Shapes = Mapping[str, tuple[int, ...]]


def file_in(dpath: Path, name: str) -> Path:
    """A file of a checkpoint directory.

    A link may lead to another place in the directory, or, in the cache of huggingface_hub, to its `blobs` folder.

    Raises:
        CheckpointError: it is missing, or a link that leads elsewhere.
    """
    fpath, root = dpath / name, dpath.resolve()
    if not os.path.isfile(fpath):  # unlike Path.is_file, False also where one may not look
        raise CheckpointError(f"{fpath} is missing; this format keeps its SAE there.")
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(fpath.resolve().is_relative_to(allowed) for allowed in [root, *blobs]):
        raise CheckpointError(f"{fpath} is a link out of its directory, to {fpath.resolve()}; put the file itself there.")
    return fpath


def read_fields(fpath: Path) -> Fields:
    """The JSON object in a small file."""
    try:
        with open(fpath, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as err:
        raise CheckpointError(f"{fpath}: {err.strerror}.") from None
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{fpath} is larger than {MAX_JSON_BYTES:,} bytes; the config of an SAE is not.")
    return Fields.parse(text, str(fpath), CheckpointError)


def read_tensors(fpath: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return read_safetensors(fpath)[0]
    except OSError as err:
        raise CheckpointError(f"{fpath}: {err.strerror}.") from None


def load_torch(fpath: Path, body: bytes) -> Any:
    """What `torch.save` wrote: tensors, numbers and texts. Nothing else is unpickled, and nothing is run.

    Args:
        fpath: for messages.
        body: the bytes.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(body)):
            with zipfile.ZipFile(io.BytesIO(body)) as archive:  # torch compresses nothing; a bomb does
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise CheckpointError(f"{fpath} holds compressed tensors, which torch.save does not write; refused.")
        with warnings.catch_warnings(action="ignore"):  # torch's advice to its own developers about odd pickles
            return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except SaevDistError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{fpath} holds more than tensors (torch.load with weights_only=True refuses it); nothing of it was run. "
            "Get the file from a source you trust, or save its state dict again."
        ) from None
    except Exception as err:  # noqa: BLE001  # torch lets through whatever a damaged byte sets off, its own assertions too
        if memory_wanted(err, torch.device("cpu")):
            what = f"{len(body) / 1e9:.1f} GB of weights do not fit into memory; free some, or convert it on a larger machine"
        else:
            what = "its weights cannot be read; the file is truncated or damaged"
        raise CheckpointError(f"{fpath}: {what}.") from None


def load_state(fpath: Path, body: bytes) -> dict[str, Any]:
    """A state dict that `torch.save` wrote."""
    state = load_torch(fpath, body)
    if not isinstance(state, dict):
        raise CheckpointError(f"{fpath} holds a {type(state).__name__}; expected a state dict: save the SAE's own.")
    if nested := [str(name) for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.is_nested]:
        raise CheckpointError(f"{fpath}: {nested[0]} is a nested tensor, which has no shape; an SAE's are plain.")
    return state


def take(fpath: Path, state: Mapping[str, Any], shapes: Shapes, kind: str) -> dict[str, Tensor]:
    """Exactly the tensors in `shapes`, as finite float32.

    Raises:
        CheckpointError: one is missing, is of another shape, holds NaN, or there is one more.
    """
    if strangers := sorted(map(str, set(state) - set(shapes))):
        raise CheckpointError(
            f"{fpath} holds unknown tensors ({', '.join(strangers)[:200]}) for {kind}; refusing to guess what they do."
        )
    return {name: _tensor(fpath, state, name, shape) for name, shape in shapes.items()}


def _tensor(fpath: Path, state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{fpath} holds no tensor {name}; it holds {', '.join(map(str, state))[:200] or 'none'}.")
    if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{fpath}: {name} is {tensor.dtype} {tuple(tensor.shape)}; the config and the other tensors promise floats {shape}."
        )
    if tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise CheckpointError(f"{fpath}: {name} {shape} is larger than what the file stores of it; refused.")
    tensor = tensor.detach().float().contiguous()
    if not torch.isfinite(tensor).all():
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{fpath}: {n_bad} of {tensor.numel()} values of {name} are NaN or infinite; the SAE is broken.")
    return tensor


def gated(fpath: Path, r_mag_s: Tensor, b_mag_s: Tensor) -> Gated:
    """The activation of a gated SAE, from the logarithm of its scale."""
    scale_s = r_mag_s.exp()
    if not (torch.isfinite(scale_s) & (scale_s > 0)).all():
        raise CheckpointError(f"{fpath}: exp(r_mag) leaves the range of float32; the SAE is broken.")
    return Gated(scale_s, b_mag_s)


def check_k(where: str, k: int, d_sae: int) -> int:
    """`k`, if there are so many features."""
    if k > d_sae:
        raise CheckpointError(f"{where}: K is {k}; the SAE has only {d_sae} features.")
    return k
