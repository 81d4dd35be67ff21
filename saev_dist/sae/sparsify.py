"""sparsify: a directory with `cfg.json` and `sae.safetensors`.

Tensors: encoder.weight (s, d), encoder.bias (s), W_dec (s, d), b_dec (d); with a skip connection also W_skip (d, d).
`num_latents` 0 means `d_in * expansion_factor`. `h = max((x - b_dec) @ W_enc + b_enc, 0)`, with `x` alone for a
transcoder; then the k largest h (topk), or the largest of each of k consecutive groups (groupmax).
A transcoder predicts another activation than the one it reads, and a skip connection adds `x @ W_skip.T` to the output:
neither changes the features, but their decoders alone do not give the activations back.
Source: sparsify 1.3.3, `sparsify/sparse_coder.py`, `fused_encoder.py`, `config.py`; the fixtures are the referees.
"""

from pathlib import Path

from saev_dist.errors import CheckpointError
from saev_dist.sae.checkpoint import check_k, file_in, read_fields, read_tensors, take
from saev_dist.sae.model import Activation, GroupMax, Sae, TopK

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
RULES = {"d_in", "num_latents", "expansion_factor", "k", "activation", "transcode", "skip_connection"}
TRAINING = {"normalize_decoder", "multi_topk"}
# They take something from the input that a file of activations does not hold, or (of before 2025) rank by magnitude.
OFF = ("embed_skip", "gram_lookup", "signed")
WITH_OFF = {"lookup_max_order", "gram_table_hash"}


def load(dpath: Path) -> Sae:
    """Read a directory.

    Raises:
        CheckpointError: a file is missing, hostile or contradictory, or of an activation that is not listed above.
    """
    cfg = read_fields(file_in(dpath, CONFIG))
    cfg.refuse_unknown(RULES | TRAINING | WITH_OFF | set(OFF))
    for name in OFF:
        if cfg.get(name, bool, False):
            raise CheckpointError(f"{cfg.where}: {name} is true; this version reads SAEs without it.")
    d_model = cfg.positive("d_in")
    d_sae = cfg.get("num_latents", int, 0)
    d_sae = cfg.positive("num_latents") if d_sae else d_model * cfg.positive("expansion_factor", default=32)
    transcode, skip = cfg.get("transcode", bool, False), cfg.get("skip_connection", bool, False)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_model),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    if skip:
        shapes["W_skip"] = (d_model, d_model)
    fpath = file_in(dpath, WEIGHTS)
    kind = cfg.get("activation", str, "topk")
    tensors = take(fpath, read_tensors(fpath), shapes, f"a {kind} SAE {'with' if skip else 'without'} skip connection")
    k = check_k(cfg.where, cfg.positive("k", default=32), d_sae)
    activation: Activation
    match kind:
        case "topk":
            activation = TopK(k, relu=True)
        case "groupmax":
            if d_sae % k:
                raise CheckpointError(f"{cfg.where}: {d_sae} features do not make {k} groups of one size.")
            activation = GroupMax(k)
        case _:
            raise CheckpointError(f"{cfg.where}: activation is {kind!r}; this version reads topk and groupmax.")
    return Sae(
        w_enc_ds=tensors["encoder.weight"].T.contiguous(),
        b_enc_s=tensors["encoder.bias"],
        w_dec_sd=tensors["W_dec"],
        b_dec_d=tensors["b_dec"],
        activation=activation,
        pre_bias=not transcode,
        reconstructs=not (transcode or skip),
        source=f"sparsify, {kind}{', transcoder' if transcode else ''}{', skip connection' if skip else ''}",
    )
