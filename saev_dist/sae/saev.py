"""saev's `sae.pt`: a line of JSON, then a `torch.save`d state dict.

State dict: W_enc (d_model, d_sae), b_enc (d_sae), W_dec (d_sae, d_model), b_dec (d_model); BatchTopK adds the scalar
activation.threshold (files from before 2025-11-16 lack it: `--threshold`). Headers, by their "schema": none (the bare
config, ReLU), 1 (two forms), 2, 3, 4, 5. They differ in names only (d_vit or d_model, exp_factor or d_sae, cls or
activation.cls), and either name is taken at any schema. The other fields are for training alone.
Source: saev's `nn/modeling.py` at each version.

Encode: `x @ W_enc + b_enc`. Files trained before 2025-07-31 meant `x - b_dec` for `x`, and so did training with the
Matryoshka objective for some time after; nothing in them says so, which is what `--pre-bias` is for. Older training also
subtracted a mean from the activations and divided them by a number, which the file does not hold: `--input-mean` and
`--input-scale`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saev_dist.errors import CheckpointError
from saev_dist.fields import Fields
from saev_dist.sae.checkpoint import check_k, load_state, take
from saev_dist.sae.model import Activation, Relu, Sae, Threshold, TopK

SCHEMAS = (1, 2, 3, 4, 5)
MAX_HEADER_BYTES = 1024 * 1024
DEFAULT_TOP_K = 32  # saev's own default, for headers that leave it out
THRESHOLD = "activation.threshold"


def load_saev(fpath: Path) -> Sae:
    """Read a checkpoint.

    Args:
        fpath: the `sae.pt`.

    Raises:
        CheckpointError: the file is missing, truncated, hostile, contradictory, or of an unknown kind.
    """
    try:
        with open(fpath, "rb") as file:
            line = file.readline(MAX_HEADER_BYTES)
            body = file.read()
    except OSError as err:
        raise CheckpointError(f"{fpath}: {err.strerror}; a saev SAE is a file, sae.pt.") from None
    if not line.startswith(b"{") or not line.endswith(b"\n"):
        raise CheckpointError(f"{fpath} does not start with a line of JSON; a saev sae.pt does.")
    header = Fields.parse(line, f"{fpath}, header", CheckpointError)
    cfg, schema = _config(header)
    kind, params = _activation_fields(header, cfg, schema)
    state = load_state(fpath, body)

    d_model = cfg.positive("d_model", "d_vit")
    d_sae = cfg.positive("d_sae") if "d_sae" in cfg.obj else d_model * cfg.positive("exp_factor")
    for names, size in ((("d_model", "d_vit"), d_model), (("exp_factor",), d_sae / d_model)):
        for name in names:
            if cfg.obj.get(name, size) != size:
                raise CheckpointError(f"{cfg.where}: {name} is {cfg.obj[name]!r}; the other fields make it {size:g}.")
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_model, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    if kind == "BatchTopK" and THRESHOLD in state:
        shapes[THRESHOLD] = ()
    tensors = take(fpath, state, shapes, f"a {kind} SAE")

    activation: Activation
    missing, k = "", 0
    match kind:
        case "Relu":
            activation = Relu()
        case "TopK":
            activation = TopK(check_k(str(fpath), params.positive("top_k", default=DEFAULT_TOP_K), d_sae))
        case "BatchTopK":
            activation = Threshold(float(tensors.get(THRESHOLD, 0.0)))
            if THRESHOLD not in tensors:
                missing, k = "--threshold", params.positive("top_k", default=DEFAULT_TOP_K)
        case _:
            raise CheckpointError(f"{fpath}: activation is {kind!r}; this version reads Relu, TopK and BatchTopK.")
    return Sae(
        w_enc_ds=tensors["W_enc"],
        b_enc_s=tensors["b_enc"],
        w_dec_sd=tensors["W_dec"],
        b_dec_d=tensors["b_dec"],
        activation=activation,
        pre_bias=False,
        relu_of_top_k=False,
        missing=missing,
        source=f"saev, {'no schema' if schema is None else f'schema {schema}'}, {kind}{f' of K {k}' if missing else ''}",
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
        state[THRESHOLD] = torch.tensor(params.pop("threshold"))
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
