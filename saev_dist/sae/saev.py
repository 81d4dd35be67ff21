"""saev's `sae.pt`: a line of JSON, then a `torch.save`d state dict.

State dict: W_enc (d_model, d_sae), b_enc (d_sae), W_dec (d_sae, d_model), b_dec (d_model); BatchTopK adds the scalar
activation.threshold. Headers, by their "schema": none (the bare config, ReLU), 1 (two forms), 2, 3, 4, 5. They differ
in names only (d_vit or d_model, exp_factor or d_sae, cls or activation.cls), and either name is taken at any schema.
Source: saev's `nn/modeling.py` at each version, as FORMATS.md sums them up.

Encode: `x @ W_enc + b_enc`. Files trained before 2025-07-31 meant `x - b_dec` for `x`; nothing in them says so, which is
what `--pre-bias` is for.
"""

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saev_dist.errors import CheckpointError
from saev_dist.fields import Fields
from saev_dist.sae.model import Activation, Relu, Sae, Threshold, TopK

SCHEMAS = (1, 2, 3, 4, 5)
MAX_HEADER_BYTES = 1024 * 1024
DEFAULT_TOP_K = 32  # saev's own default, for headers that leave it out


def load_saev(fpath: Path, *, pre_bias: bool | None = None) -> Sae:
    """Read a checkpoint.

    Args:
        fpath: the `sae.pt`.
        pre_bias: whether the encoder subtracts b_dec; None means no, as the format says today.

    Raises:
        CheckpointError: the file is missing, truncated, hostile, contradictory, or of an unknown kind.
    """
    try:
        with open(fpath, "rb") as file:
            line = file.readline(MAX_HEADER_BYTES)
            body = file.read()
    except OSError as err:
        raise CheckpointError(f"{fpath}: {err.strerror}; --sae takes the path of a saev sae.pt.") from None
    if not line.startswith(b"{") or not line.endswith(b"\n"):
        raise CheckpointError(f"{fpath} does not start with a line of JSON; a saev sae.pt does.")
    header = Fields.parse(line, f"{fpath}, header", CheckpointError)
    cfg, schema = _config(header)
    kind, params = _activation_fields(header, cfg, schema)
    state = _load_state(fpath, body)

    d_model = cfg.positive("d_model", "d_vit")
    d_sae = cfg.positive("d_sae") if "d_sae" in cfg.obj else d_model * cfg.positive("exp_factor")
    shapes = {"W_enc": (d_model, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    if kind == "BatchTopK":
        shapes["activation.threshold"] = ()
    tensors = {name: _tensor(fpath, state, name, shape) for name, shape in shapes.items()}
    if strangers := sorted(map(str, set(state) - set(shapes))):
        raise CheckpointError(f"{fpath} holds unknown tensors ({', '.join(strangers)}) for a {kind} SAE; refusing to guess.")

    activation: Activation
    match kind:
        case "Relu":
            activation = Relu()
        case "TopK":
            activation = TopK(params.positive("top_k", default=DEFAULT_TOP_K))
            if activation.k > d_sae:
                raise CheckpointError(f"{fpath}: top_k is {activation.k}; the SAE has only {d_sae} features.")
        case "BatchTopK":
            activation = Threshold(float(tensors["activation.threshold"]))
        case _:
            raise CheckpointError(f"{fpath}: activation is {kind!r}; this version reads Relu, TopK and BatchTopK.")
    return Sae(
        w_enc_ds=tensors["W_enc"],
        b_enc_s=tensors["b_enc"],
        w_dec_sd=tensors["W_dec"],
        b_dec_d=tensors["b_dec"],
        activation=activation,
        pre_bias=bool(pre_bias),
        source=f"saev, {'no schema' if schema is None else f'schema {schema}'}, {kind}",
    )


def save_saev(
    fpath: Path, w_enc_ds: Tensor, b_enc_s: Tensor, w_dec_sd: Tensor, b_dec_d: Tensor, activation: dict[str, Any]
) -> None:
    """Write a checkpoint of schema 5.

    Args:
        fpath: file to write.
        w_enc_ds, b_enc_s, w_dec_sd, b_dec_d: float32 weights.
        activation: saev's tag, such as `{"cls": "TopK", "params": {"top_k": 32}}`. For BatchTopK its params hold the
            `threshold`, which goes where saev keeps it, into the state dict.
    """
    d_model, d_sae = w_enc_ds.shape
    params = dict(activation.get("params", {}))
    state = {"W_enc": w_enc_ds, "b_enc": b_enc_s, "W_dec": w_dec_sd, "b_dec": b_dec_d}
    if activation["cls"] == "BatchTopK":
        state["activation.threshold"] = torch.tensor(params.pop("threshold"))
    cfg = {"d_model": d_model, "d_sae": d_sae, "activation": {"cls": activation["cls"], "params": params}}
    header = {"schema": 5, "cfg": cfg, "commit": "unknown", "lib": "saev_dist"}
    with open(fpath, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, file)


def _config(header: Fields) -> tuple[Fields, int | None]:
    """The object that holds the sizes, and the schema."""
    if "schema" not in header.obj:
        return header, None
    schema = header.get("schema", int)
    if schema not in SCHEMAS:
        raise CheckpointError(f"{header.where}: schema is {schema}; this version reads none and 1 to {SCHEMAS[-1]}.")
    return header.sub("cfg"), schema


def _activation_fields(header: Fields, cfg: Fields, schema: int | None) -> tuple[str, Fields]:
    """Name of the activation, and the object that holds its parameters."""
    if "activation" in cfg.obj:
        activation = cfg.sub("activation")
        return activation.get("cls", str), Fields(activation.get("params", dict, {}), activation.where, CheckpointError)
    if schema is not None and schema > 1:
        raise CheckpointError(f"{cfg.where} has no field 'activation', which schema {schema} must have; refusing to guess.")
    kind = "Relu" if schema is None else header.get("cls", str)
    # schema 1 named the activation there first, later the config's class
    return ("Relu" if kind == "SparseAutoencoderConfig" else kind), cfg


def _load_state(fpath: Path, body: bytes) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice to its own developers about odd pickles
            state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{fpath} holds more than tensors (torch.load with weights_only=True refuses it); nothing of it was run. "
            "Get the file from a source you trust, or save its state dict again."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError):
        raise CheckpointError(
            f"{fpath}: the weights after the header cannot be read; the file is truncated or damaged."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{fpath} holds a {type(state).__name__} after its header; expected a state dict.")
    return state


def _tensor(fpath: Path, state: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A finite tensor of the state dict, as float32."""
    tensor = state.get(name)
    if not isinstance(tensor, Tensor):
        hint = " BatchTopK files from before 2025-11-16 lack it: save the SAE with a newer saev." if "threshold" in name else ""
        raise CheckpointError(f"{fpath} holds no tensor {name}; it holds {', '.join(map(str, state)) or 'none'}.{hint}")
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise CheckpointError(f"{fpath}: {name} is {tensor.dtype} {tuple(tensor.shape)}; the header promises floats {shape}.")
    tensor = tensor.float().contiguous()
    if not torch.isfinite(tensor).all():
        n_bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{fpath}: {n_bad} of {tensor.numel()} values of {name} are NaN or infinite; the SAE is broken.")
    return tensor
