"""SAELens: a directory with `cfg.json` and `sae_weights.safetensors`.

Tensors: W_enc (d, s), b_enc (s), W_dec (s, d), b_dec (d); jumprelu also threshold (s); gated has b_gate, b_mag and r_mag,
each (s), and no b_enc. The input is normalised as `normalize_activations` says, `b_dec` is subtracted where
`apply_b_dec_to_input` (absent: true), and `h = x @ W_enc + b_enc`. Then

    standard   max(h, 0)
    jumprelu   max(h, 0) where h > threshold
    topk       the k largest h, those above zero
    batchtopk  max(h, 0) where h > topk_threshold, a scalar
    gated      (x @ W_enc + b_gate > 0) * max(x @ (W_enc * exp(r_mag)) + b_mag, 0)

With `rescale_acts_by_decoder_norm` h of topk and batchtopk is multiplied by the norms of W_dec's rows first, and the
decoder divides by them: both are folded into the weights here. batchtopk, and matryoshka_batchtopk, which encodes alike,
are architectures of training's own checkpoints. They are read as `save_inference_model` would write them, as jumprelu; `k`
is of training alone, where `encode` keeps a batch's strongest, k a token on average. When training with
expected_average_only_in and rescaling ended, 6.14.0 to 6.54.8 did not scale their threshold as the norms of W_dec (SAELens'
issue 763): nothing in the file tells.

Before version 6, `activation_fn` or `activation_fn_str` "topk" with `activation_fn_kwargs.k` makes a "standard" SAE a TopK
one; a boolean `normalize_activations` means none or expected_average_only_in. That one multiplies the input by a scale that
training measured: checkpoints made during training have it beside them, in `activation_scaler.json`, and where it is not,
`--input-scale` gives it. At the end of training it is folded into the weights, and the normalisation is then "none".
`scaling_factor` (s) of files fine-tuned by version 3 to 5 multiplies features in the decoder only.
Source: SAELens 3.0 to 6.54, `sae_lens/saes/*.py` (before: `sae.py`, `training/training_sae.py`) and
`loading/pretrained_sae_loaders.py`; the fixtures are the referees.
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from saev_dist.errors import CheckpointError
from saev_dist.fields import Fields
from saev_dist.sae.checkpoint import check_k, file_in, gated, read_fields, read_tensors, take
from saev_dist.sae.model import TOKEN_NORMS, Activation, Given, InputNorm, Relu, Sae, Threshold, TopK

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", *BATCH_TOPK)
AVERAGE = "expected_average_only_in"
# What encoding depends on.
RULES = {
    "architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "k", "rescale_acts_by_decoder_norm",
    "activation_fn", "activation_fn_str", "activation_fn_kwargs", "reshape_activations", "finetuning_scaling_factor",
}  # fmt: skip
# Where the SAE comes from, and how it was trained.
PROVENANCE = {
    "dtype", "device", "metadata", "model_name", "model_class_name", "hook_name", "hook_point", "hook_layer",
    "hook_point_layer", "hook_head_index", "hook_point_head_index", "hook_point_eval", "prepend_bos", "context_size",
    "dataset_path", "dataset_trust_remote_code", "sae_lens_version", "sae_lens_training_version", "neuronpedia_id",
    "model_from_pretrained_kwargs", "seqpos_slice", "exclude_special_tokens", "expansion_factor", "seed",
    "l1_coefficient", "l1_warm_up_steps", "lp_norm", "use_ghost_grads", "normalize_sae_decoder", "noise_scale",
    "decoder_orthogonal_init", "decoder_heuristic_init", "decoder_heuristic_init_norm", "decoder_init_norm",
    "init_encoder_as_decoder_transpose", "mse_loss_normalization", "scale_sparsity_penalty_by_decoder_norm",
    "b_dec_init_method", "from_pretrained_path", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_tanh_scale",
    "jumprelu_sparsity_loss_mode", "jumprelu_ste_to_input", "target_l0", "l0_coefficient", "l0_warm_up_steps",
    "pre_act_loss_coefficient", "aux_loss_coefficient", "use_sparse_activations", "topk_threshold_lr", "matryoshka_widths",
    "use_matryoshka_aux_loss",
}  # fmt: skip


def load(dpath: Path) -> Sae:
    """Read a directory.

    Raises:
        CheckpointError: a file is missing, hostile or contradictory, or of an architecture that is not listed above.
    """
    cfg = read_fields(file_in(dpath, CONFIG))
    architecture = _architecture(cfg)
    cfg.refuse_unknown(RULES | PROVENANCE)
    d_model, d_sae = cfg.positive("d_in"), cfg.positive("d_sae")
    if (reshape := cfg.get("reshape_activations", str, "none")) != "none":
        raise CheckpointError(f'{cfg.where}: reshape_activations is {reshape!r}; only "none" makes sense for stored tokens.')

    fpath = file_in(dpath, WEIGHTS)
    state = read_tensors(fpath)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_model, d_sae), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    own = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    shapes |= dict.fromkeys(own, (d_sae,))
    if architecture in BATCH_TOPK:
        shapes["topk_threshold"] = ()
    if "scaling_factor" in state:
        shapes["scaling_factor"] = (d_sae,)
    tensors = take(fpath, state, shapes, f"architecture {architecture}")
    w_enc_ds, w_dec_sd = tensors["W_enc"], _finetuned(cfg, fpath, tensors)
    b_enc_s = tensors["b_gate" if architecture == "gated" else "b_enc"]

    if cfg.get("rescale_acts_by_decoder_norm", bool, False):
        norm_s = tensors["W_dec"].double().norm(dim=1)
        if not norm_s.all():
            raise CheckpointError(f"{fpath}: a row of W_dec is zero, and rescale_acts_by_decoder_norm divides by its norm.")
        w_enc_ds, b_enc_s = (w_enc_ds * norm_s).float(), (b_enc_s * norm_s).float()
        w_dec_sd = (w_dec_sd / norm_s[:, None]).float()
    activation: Activation
    match architecture:
        case "topk":
            activation = TopK(check_k(cfg.where, _k(cfg), d_sae), relu=True)
        case "batchtopk" | "matryoshka_batchtopk":
            activation = Threshold(float(tensors["topk_threshold"]))
        case "gated":
            activation = gated(fpath, tensors["r_mag"], tensors["b_mag"])
        case "jumprelu":
            activation = Threshold(tensors["threshold"])
        case _:
            activation = Relu()
    norm = _norm(cfg)
    input_norm = _scaler(dpath, d_model) if norm == AVERAGE else TOKEN_NORMS[norm]
    return Sae(
        w_enc_ds=w_enc_ds,
        b_enc_s=b_enc_s,
        w_dec_sd=w_dec_sd,
        b_dec_d=tensors["b_dec"],
        activation=activation,
        pre_bias=cfg.get("apply_b_dec_to_input", bool, True),
        input_norm=input_norm,
        missing="--input-scale" if norm == AVERAGE and input_norm is None else "",
        source=f"SAELens, {architecture}, input {norm}",
    )


def _architecture(cfg: Fields) -> str:
    """The architecture, with TopK of before version 6 under its name of today."""
    architecture = cfg.get("architecture", str, "standard")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{cfg.where}: architecture is {architecture!r}; this version reads {', '.join(ARCHITECTURES)}.")
    function = cfg.get(("activation_fn", "activation_fn_str"), str, "relu")
    if function == "topk" and architecture == "standard":
        architecture = "topk"
    elif function != "relu" and not (function == "topk" and architecture == "topk"):
        raise CheckpointError(f"{cfg.where}: activation function {function!r} with architecture {architecture!r} is not known.")
    if architecture not in ("topk", *BATCH_TOPK):
        for name in ("k", "rescale_acts_by_decoder_norm"):
            if cfg.obj.get(name):
                raise CheckpointError(
                    f"{cfg.where}: {name} is set, and the architecture is {architecture!r}; one of them is wrong."
                )
    return architecture


def _k(cfg: Fields) -> int:
    """k, from where this version keeps it."""
    kwargs = Fields(cfg.get("activation_fn_kwargs", dict, {}), f"{cfg.where}, 'activation_fn_kwargs'", CheckpointError)
    found = {fields.positive("k") for fields in (cfg, kwargs) if "k" in fields.obj}
    if len(found) != 1:
        raise CheckpointError(f"{cfg.where} gives {len(found) or 'no'} values for k; a TopK SAE has one.")
    return found.pop()


def _norm(cfg: Fields) -> str:
    """The name of the input's normalisation."""
    name = cfg.obj.get("normalize_activations", "none")
    if isinstance(name, bool):
        name = AVERAGE if name else "none"
    if name is None:
        name = "none"
    known = (*TOKEN_NORMS, AVERAGE)
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{cfg.where}: normalize_activations is {name!r}; this version reads {', '.join(known)}.")
    return name


def _scaler(dpath: Path, d_model: int) -> InputNorm | None:
    """The scale that lies beside a checkpoint made during training; None: there is none."""
    if not os.path.lexists(dpath / SCALER):
        return None
    fields = read_fields(file_in(dpath, SCALER))
    fields.refuse_unknown({"scaling_factor", "has_whitening"})
    if fields.get("has_whitening", bool, False):
        raise CheckpointError(f"{fields.where}: has_whitening is true; this version reads checkpoints without it.")
    if fields.obj.get("scaling_factor") is None:
        return None
    scale = fields.get("scaling_factor", float)
    if not 0 < scale < math.inf:
        raise CheckpointError(f"{fields.where}: scaling_factor is {scale}; it should be above zero, and finite.")
    return Given(torch.zeros(d_model), scale)


def _finetuned(cfg: Fields, fpath: Path, tensors: dict[str, Tensor]) -> Tensor:
    """W_dec, with the factors of fine-tuning folded in where the file has them."""
    factor_s, wanted = tensors.get("scaling_factor"), cfg.get("finetuning_scaling_factor", bool, False)
    if factor_s is None or (not wanted and (factor_s == 1).all()):  # version 3 wrote ones for all SAEs
        if wanted and factor_s is None:
            raise CheckpointError(f"{cfg.where}: finetuning_scaling_factor is true; {fpath} holds no tensor scaling_factor.")
        return tensors["W_dec"]
    if not wanted:
        raise CheckpointError(f"{fpath} holds a scaling_factor; {cfg.where} says that there is none.")
    return tensors["W_dec"] * factor_s[:, None]
