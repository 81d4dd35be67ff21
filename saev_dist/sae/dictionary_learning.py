"""dictionary_learning: a directory with `config.json` and `ae.pt`.

`config.json` names the class under `trainer.dict_class`; `ae.pt` is a `torch.save`d state dict. All but two store
encoder.weight (s, d) and decoder.weight (d, s).

    AutoEncoder                 bias (d), encoder.bias (s)              max((x - bias) @ W + b, 0)
    AutoEncoderNew              decoder.bias (d), encoder.bias (s)      max(x @ W + b, 0)
    AutoEncoderTopK             b_dec, encoder.bias, k, threshold       the k largest of max((x - b_dec) @ W + b, 0)
    BatchTopKSAE                b_dec, encoder.bias, k, threshold       (x - b_dec) @ W + b where above max(threshold, 0)
    MatryoshkaBatchTopKSAE      W_enc (d, s), b_enc, W_dec (s, d), b_dec, k, threshold, group_sizes       the same
    JumpReluAutoEncoder         W_enc (d, s), b_enc, W_dec (s, d), b_dec, threshold (s)      x @ W + b where above threshold
    GatedAutoEncoder            decoder_bias (d), r_mag, gate_bias, mag_bias (s)     as Gated, of x - decoder_bias

AutoEncoderTopK's threshold belongs to training. A threshold below 0 is one that training never set; the earliest
BatchTopKSAEs have none (`--threshold`).
Features are those of `encode` on the weights as they are stored. The library's `load_dictionary` also makes the decoder's
columns of an AutoEncoder unit vectors and multiplies its features by their norms, which training by the April update
leaves free: then the same tokens fire in the same order, and each feature's scores differ by one factor.
A top level {step, ae, optimizer, config, norm_factor} is a training backup: it was trained on activations divided by
`norm_factor`, and its biases and thresholds still have to be multiplied by it, which is done here.
Source: dictionary_learning 0.1.0, `dictionary.py`, `trainers/*.py` (`encode`, `scale_biases`), `training.py`.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from saev_dist.errors import CheckpointError
from saev_dist.fields import Fields
from saev_dist.sae.checkpoint import check_k, file_in, gated, load_state, read_fields, take
from saev_dist.sae.model import Activation, Relu, Sae, Threshold, TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"
BACKUP = {"step", "ae", "optimizer", "config", "norm_factor"}
RULES = {"dict_class", "activation_dim", "dict_size", "k"}
TRAINING = {
    "trainer_class", "layer", "lm_name", "device", "wandb_name", "submodule_name", "steps", "seed", "lr", "warmup_steps",
    "decay_start", "sparsity_warmup_steps", "l1_penalty", "resample_steps", "aux_penalty", "auxk_alpha", "top_k_aux",
    "threshold_beta", "threshold_start_step", "k_anneal_steps", "group_sizes", "group_fractions", "group_weights",
    "bandwidth", "sparsity_penalty", "target_l0", "sparsity_function", "initial_sparsity_penalty", "p_start", "p_end",
    "anneal_start", "anneal_end", "sparsity_queue_length", "n_sparsity_updates", "use_decoder_norm", "norm_factor",
}  # fmt: skip
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
}
BATCH_TOPK = {"BatchTopKSAE", "MatryoshkaBatchTopKSAE"}
PRE_BIAS = {"AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "GatedAutoEncoder"}
B_ENC = ("encoder.bias", "b_enc", "gate_bias")
B_DEC = ("bias", "decoder.bias", "b_dec", "decoder_bias")


def load(dpath: Path) -> Sae:
    """Read a directory.

    Raises:
        CheckpointError: a file is missing, hostile or contradictory, or of a class that is not listed above.
    """
    config = read_fields(file_in(dpath, CONFIG))
    config.refuse_unknown({"trainer", "buffer"})
    trainer = config.sub("trainer")
    trainer.refuse_unknown(RULES | TRAINING)
    kind = trainer.get("dict_class", str)
    if kind not in TENSORS:
        raise CheckpointError(f"{trainer.where}: dict_class is {kind!r}; this version reads {', '.join(TENSORS)}.")
    d_model, d_sae = trainer.positive("activation_dim"), trainer.positive("dict_size")

    fpath = file_in(dpath, WEIGHTS)
    state, norm_factor = _state(fpath)
    if kind == "AutoEncoderTopK" or kind in BATCH_TOPK:
        _check_k(fpath, state, trainer)
        state.pop("group_sizes", None)  # all groups are active once training is over
    if kind == "AutoEncoderTopK":
        state.pop("threshold", None)
    width = {
        "encoder.weight": (d_sae, d_model), "decoder.weight": (d_model, d_sae),
        "W_enc": (d_model, d_sae), "W_dec": (d_sae, d_model),
        **dict.fromkeys(B_DEC, (d_model,)),
        "threshold": (d_sae,) if kind == "JumpReluAutoEncoder" else (),
    }  # fmt: skip
    missing = "--threshold" if kind in BATCH_TOPK and "threshold" not in state else ""
    names = (*TENSORS[kind], *(["threshold"] if kind in BATCH_TOPK and not missing else []))
    tensors = take(fpath, state, {name: width.get(name, (d_sae,)) for name in names}, kind)
    for name, tensor in tensors.items():
        if name in (*B_ENC, *B_DEC, "mag_bias", "threshold"):
            tensors[name] = tensor * norm_factor

    activation: Activation
    match kind:
        case "AutoEncoderTopK":
            activation = TopK(check_k(trainer.where, trainer.positive("k"), d_sae), relu=True)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            activation = Threshold(0.0 if missing else float(tensors["threshold"]))
        case "JumpReluAutoEncoder":
            activation = Threshold(tensors["threshold"])
        case "GatedAutoEncoder":
            activation = gated(fpath, tensors["r_mag"], tensors["mag_bias"])
        case _:
            activation = Relu()
    backup = "" if norm_factor == 1 else f", training backup, norm factor {norm_factor:g}"
    of_k = f" of K {trainer.positive('k')}" if missing else ""
    return Sae(
        w_enc_ds=_first(tensors, "W_enc", "encoder.weight"),
        b_enc_s=_first(tensors, *B_ENC),
        w_dec_sd=_first(tensors, "W_dec", "decoder.weight"),
        b_dec_d=_first(tensors, *B_DEC),
        activation=activation,
        pre_bias=kind in PRE_BIAS,
        missing=missing,
        source=f"dictionary_learning, {kind}{of_k}{backup}",
    )


def _state(fpath: Path) -> tuple[dict[str, Any], float]:
    """The state dict, and what its biases are to be multiplied by."""
    try:
        state = load_state(fpath, fpath.read_bytes())
    except OSError as err:
        raise CheckpointError(f"{fpath}: {err.strerror}.") from None
    if "ae" not in state:
        return state, 1.0
    factor, inner = _number(state.get("norm_factor")), state["ae"]
    if not 0 < factor < math.inf or not isinstance(inner, dict):
        raise CheckpointError(
            f"{fpath} is a training backup with norm_factor {str(state.get('norm_factor'))[:40]}; its biases cannot be scaled "
            "without a positive one. Use the ae.pt that training saves at its end."
        )
    if strangers := sorted(map(str, set(state) - BACKUP)):
        raise CheckpointError(f"{fpath} is a training backup with unknown members ({', '.join(strangers)[:200]}).")
    return dict(inner), factor


def _check_k(fpath: Path, state: dict[str, Any], trainer: Fields) -> None:
    """Take `k` out of the state dict: it must be the config's."""
    k = state.pop("k", None)
    if k is not None and _number(k) != trainer.positive("k"):
        raise CheckpointError(f"{fpath} holds k {str(k)[:40]}; {trainer.where} says {trainer.obj['k']}. One of them is stale.")


def _number(value: Any) -> float:
    """A number, or what a tensor of one element holds; NaN for anything else."""
    try:
        return float(value) if isinstance(value, Tensor | int | float) else math.nan
    except (RuntimeError, ValueError, OverflowError):  # several elements, or a tensor without data
        return math.nan


def _first(tensors: dict[str, Tensor], *names: str) -> Tensor:
    """The tensor under whichever name is there; weights of `torch.nn.Linear` are stored the other way round."""
    name = next(name for name in names if name in tensors)
    return tensors[name].T.contiguous() if name.endswith(".weight") else tensors[name]
