"""saev_dist's own form of an SAE: one safetensors file, which `saev-dist convert` writes and any program can read.

Tensors, float32: W_enc (d, s), b_enc (s), W_dec (s, d), b_dec (d), and by the rules threshold (s), mag_scale and b_mag
(s), input_mean (d). `__metadata__` holds "format": "saev_dist.sae", "version": "1", "source": words, and "rules": JSON of

    activation   relu: max(h, 0). topk: the `k` largest h, with "relu": true only those above zero.
                 threshold: h where h > max(threshold, 0), a number `threshold` here or the tensor.
                 gated: max(mag_scale * (h - b_enc) + b_mag, 0) where h > 0. groupmax: the largest h of each of `k`
                 consecutive groups, where above zero.
    pre_bias     whether b_dec is subtracted from the (normalised) input.
    input_norm   none; layer_norm; constant_norm_rescale; given: (x - input_mean) * `input_scale`. As `model` defines them.
    reconstructs whether the decoder gives the input back (a transcoder's does not).
    relu_of_top_k   what `--activation topk:K` means: with "relu": true or (also where this is left out) false.

with h = x @ W_enc + b_enc of the normalised x.
"""

import json
import math
from pathlib import Path

from torch import Tensor

from saev_dist.errors import CheckpointError
from saev_dist.fields import Fields
from saev_dist.sae.checkpoint import check_k, take
from saev_dist.sae.model import (
    TOKEN_NORMS,
    Activation,
    Gated,
    Given,
    GroupMax,
    InputNorm,
    Relu,
    Sae,
    Threshold,
    TopK,
)
from saev_dist.sae.safetensors import METADATA, read_safetensors, write_safetensors

FORMAT, VERSION = "saev_dist.sae", "1"
RULES = {"activation", "k", "relu", "threshold", "pre_bias", "input_norm", "input_scale", "reconstructs", "relu_of_top_k"}


def recognises(header: Fields) -> bool:
    """Whether a safetensors file with this header is of this format."""
    metadata = header.obj.get(METADATA)
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT


def load(fpath: Path) -> Sae:
    """Read a file.

    Raises:
        CheckpointError: the file is missing, hostile or contradictory, or its rules are not those above.
    """
    try:
        state, metadata = read_safetensors(fpath)
    except OSError as err:
        raise CheckpointError(f"{fpath}: {err.strerror}; --sae takes a checkpoint.") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{fpath}: format {metadata.get('format', 'none')!r}, version {metadata.get('version', 'none')!r}; this version "
            f"reads {FORMAT!r}, {VERSION!r}. Weights of SAELens and sparsify need the cfg.json beside them: name the directory."
        )
    if not (source := metadata.get("source", "saev_dist")).isprintable():  # it is shown as it stands
        raise CheckpointError(f"{fpath}: source is {source[:80]!r}; it should be words on one line.")
    rules = Fields.parse(metadata.get("rules", "").encode(), f"{fpath}, rules", CheckpointError)
    rules.refuse_unknown(RULES)
    name, norm_name = rules.get("activation", str), rules.get("input_norm", str)
    w_enc = state.get("W_enc")
    if w_enc is None or w_enc.dim() != 2 or not w_enc.numel():
        raise CheckpointError(f"{fpath} holds no tensor W_enc of two dimensions.")
    d_model, d_sae = w_enc.shape
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_model, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    if name == "gated":
        shapes |= {"mag_scale": (d_sae,), "b_mag": (d_sae,)}
    if name == "threshold" and "threshold" not in rules.obj:
        shapes["threshold"] = (d_sae,)
    if norm_name == "given":
        shapes["input_mean"] = (d_model,)
    tensors = take(fpath, state, shapes, f"activation {name}, input_norm {norm_name}")
    return Sae(
        w_enc_ds=tensors["W_enc"],
        b_enc_s=tensors["b_enc"],
        w_dec_sd=tensors["W_dec"],
        b_dec_d=tensors["b_dec"],
        activation=_activation(rules, name, tensors, d_sae),
        pre_bias=rules.get("pre_bias", bool),
        input_norm=_norm(rules, norm_name, tensors),
        reconstructs=rules.get("reconstructs", bool),
        relu_of_top_k=rules.get("relu_of_top_k", bool, False),
        source=source,
    )


def save(fpath: Path, sae: Sae) -> None:
    """Write an SAE."""
    tensors = {"W_enc": sae.w_enc_ds, "b_enc": sae.b_enc_s, "W_dec": sae.w_dec_sd, "b_dec": sae.b_dec_d}
    match sae.activation:
        case Threshold(Tensor() as threshold_s):
            tensors["threshold"] = threshold_s
        case Gated(scale_s, b_mag_s):
            tensors |= {"mag_scale": scale_s, "b_mag": b_mag_s}
    if isinstance(sae.input_norm, Given):
        tensors["input_mean"] = sae.input_norm.mean_d
    rules = sae.rules() | {"relu_of_top_k": sae.relu_of_top_k}
    metadata = {"format": FORMAT, "version": VERSION, "source": sae.source, "rules": json.dumps(rules)}
    write_safetensors(fpath, tensors, metadata)


def _activation(rules: Fields, name: str, tensors: dict[str, Tensor], d_sae: int) -> Activation:
    expected = {"topk": {"k", "relu"}, "groupmax": {"k"}, "threshold": {"threshold"}}.get(name, set())
    _refuse_besides(rules, {"k", "relu", "threshold"}, expected, f"activation {name}")
    match name:
        case "relu":
            return Relu()
        case "topk":
            return TopK(check_k(rules.where, rules.positive("k"), d_sae), rules.get("relu", bool))
        case "threshold":
            return Threshold(tensors["threshold"] if "threshold" in tensors else _finite(rules, "threshold"))
        case "gated":
            if not (tensors["mag_scale"] > 0).all():
                raise CheckpointError(f"{rules.where}: the tensor mag_scale has values that are not above zero.")
            return Gated(tensors["mag_scale"], tensors["b_mag"])
        case "groupmax":
            k = rules.positive("k")
            if d_sae % k:
                raise CheckpointError(f"{rules.where}: {d_sae} features do not make {k} groups of one size.")
            return GroupMax(k)
    raise CheckpointError(f"{rules.where}: activation is {name!r}; it is relu, topk, threshold, gated or groupmax.")


def _norm(rules: Fields, name: str, tensors: dict[str, Tensor]) -> InputNorm | None:
    _refuse_besides(rules, {"input_scale"}, {"input_scale"} if name == "given" else set(), f"input_norm {name}")
    if name == "given":
        scale = _finite(rules, "input_scale")
        if scale == 0:
            raise CheckpointError(f"{rules.where}: input_scale is 0.")
        return Given(tensors["input_mean"], scale)
    if name not in TOKEN_NORMS:
        raise CheckpointError(f"{rules.where}: input_norm is {name!r}; it is {', '.join(TOKEN_NORMS)} or given.")
    return TOKEN_NORMS[name]


def _refuse_besides(rules: Fields, of: set[str], expected: set[str], what: str) -> None:
    if strangers := sorted(of & set(rules.obj) - expected):
        raise CheckpointError(f"{rules.where}: {', '.join(strangers)} does not go with {what}.")


def _finite(fields: Fields, name: str) -> float:
    """A number that is neither NaN nor infinite."""
    value = fields.get(name, float)
    if not math.isfinite(value):
        raise CheckpointError(f"{fields.where}: {name} is {value}; it should be finite.")
    return value
