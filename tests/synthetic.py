"""Data for tests: shards and SAEs from small integers, so that every product is exact and ties abound."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.data.shards import ShardWriter
from saev_dist.sae.saev import save_saev

D_MODEL, D_SAE, N_PATCHES, N_IMGS = 6, 24, 5, 23


def make_acts(n_imgs: int = N_IMGS, n_patches: int = N_PATCHES, d_model: int = D_MODEL, seed: int = 0) -> NDArray[np.float32]:
    """Small integers, float32 (images, patches, d_model)."""
    return np.random.default_rng(seed).integers(-2, 3, (n_imgs, n_patches, d_model)).astype(np.float32)


def make_shards(
    dpath: Path,
    acts_epd: NDArray[np.float32],
    *,
    imgs_per_shard: int = 7,
    layers: tuple[int, ...] = (4,),
    layer: int = 4,
    cls_token: bool = False,
) -> Path:
    """Write `acts_epd` as one layer; other layers and CLS tokens hold 1000, which would top every slot."""
    n_imgs, n_patches, d_model = acts_epd.shape
    full = np.full((n_imgs, len(layers), n_patches + cls_token, d_model), 1000, np.float32)
    full[:, layers.index(layer), int(cls_token) :] = acts_epd
    with ShardWriter(
        dpath,
        family="test",
        ckpt="integers",
        layers=layers,
        content_tokens_per_example=n_patches,
        d_model=d_model,
        cls_token=cls_token,
        max_tokens_per_shard=imgs_per_shard * len(layers) * (n_patches + cls_token),
    ) as writer:
        writer.write(full)
    return dpath


def make_weights(d_model: int = D_MODEL, d_sae: int = D_SAE, seed: int = 1) -> dict[str, Tensor]:
    """Integer weights with two equal features (ties), one that never fires and one that always does."""
    rng = np.random.default_rng(seed)
    w_enc = torch.from_numpy(rng.integers(-1, 2, (d_model, d_sae)).astype(np.float32))
    w_enc[:, 1] = w_enc[:, 0]
    w_enc[:, 2] = 0
    w_enc[:, 3] = 0
    b_enc = torch.from_numpy(rng.integers(-3, 1, d_sae).astype(np.float32))
    b_enc[1] = b_enc[0]
    b_enc[2], b_enc[3] = -1, 2
    return {"w_enc_ds": w_enc, "b_enc_s": b_enc, "w_dec_sd": w_enc.T.contiguous(), "b_dec_d": torch.ones(d_model)}


RELU = {"cls": "Relu", "params": {}}
TOPK = {"cls": "TopK", "params": {"top_k": 4}}
BATCH_TOPK = {"cls": "BatchTopK", "params": {"top_k": 4, "threshold": 1.0}}


def make_sae(fpath: Path, activation: dict = RELU, **sizes: int) -> Path:
    save_saev(fpath, **make_weights(**sizes), activation=activation)
    return fpath


def dense_codes(acts_epd: NDArray[np.float32], weights: dict[str, Tensor], activation: dict) -> NDArray[np.float32]:
    """All codes, float32 (images, patches, d_sae), by the definition; of equal values TopK keeps the lower feature."""
    h = acts_epd @ weights["w_enc_ds"].numpy() + weights["b_enc_s"].numpy()
    match activation["cls"]:
        case "Relu":
            return np.maximum(h, 0)
        case "BatchTopK":
            return np.where(h > activation["params"]["threshold"], h, 0)
    order = np.argsort(-h, axis=-1, kind="stable")[..., : activation["params"]["top_k"]]
    codes = np.zeros_like(h)
    np.put_along_axis(codes, order, np.take_along_axis(h, order, -1), -1)
    return codes


def brute_force_slots(codes_eps: NDArray[np.float32], top_k: int, rank_by: str) -> tuple[list, list, list]:
    """Scores, images and patches of every feature's slots: a loop over everything and Python's own sort."""
    n_imgs, n_patches, d_sae = codes_eps.shape
    values, imgs, patches = [], [], []
    for s in range(d_sae):
        found = [(-float(codes_eps[e, p, s]), e, p) for e in range(n_imgs) for p in range(n_patches) if codes_eps[e, p, s] > 0]
        if rank_by == "image":
            found = [min(place for place in found if place[1] == e) for e in sorted({e for _, e, _ in found})]
        kept = [(-v, e, p) for v, e, p in sorted(found)[:top_k]]
        kept += [(-float("inf"), -1, -1)] * (top_k - len(kept))
        values.append([v for v, _, _ in kept])
        imgs.append([e for _, e, _ in kept])
        patches.append([p for _, _, p in kept])
    return values, imgs, patches


def make_command(dpath: Path, *flags: object) -> list[object]:
    """`extract` on shards and an SAE that are made below `dpath`, batches of two images; the value of --out is to follow."""
    shards, sae = make_shards(dpath / "shards", make_acts()), make_sae(dpath / "sae.pt")
    small = ["--batch-tokens", 2 * N_PATCHES, "--top-k", 4, "--no-progress", "--self-check", "off"]
    return ["extract", "--shards", shards, "--sae", sae, *small, *flags, "--out"]


SETTINGS = ("--batch-tokens", str(2 * N_PATCHES), "--top-k", "4", "--no-progress")
"""With which an `extract` of so little takes several batches and says little."""


def make_inputs(dpath: Path) -> list[str]:
    """Flags for shards and an SAE that are made below `dpath`, with SETTINGS."""
    shards, sae = make_shards(dpath / "shards", make_acts()), make_sae(dpath / "sae.pt")
    return ["--shards", str(shards), "--sae", str(sae), *SETTINGS]
