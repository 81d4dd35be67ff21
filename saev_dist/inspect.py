"""`saev-dist inspect PATH`: what a shards directory, an SAE checkpoint or a run holds, and whether it is sound."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saev_dist.config import Inspect
from saev_dist.data.reader import find_bad_value, read_batch
from saev_dist.data.shards import FLOAT_BYTES, Shards, read_layers
from saev_dist.errors import ConfigError, RunError
from saev_dist.estimate import gb
from saev_dist.plan import Plan
from saev_dist.report import table
from saev_dist.sae.saev import load_saev
from saev_dist.store import Run

N_SAMPLED = 32
NO_LIMIT = float("inf")


def run(cfg: Inspect) -> None:
    """Describe and check what is at `cfg.path`.

    Raises:
        SaevDistError: it is none of the three, or not sound; the message names what is wrong.
    """
    for marker, describe in DESCRIBERS.items():
        if os.path.exists(cfg.path / marker):
            print(table(dict(describe(cfg.path))))
            return
    if not os.path.isfile(cfg.path):
        found = "a directory without" if os.path.isdir(cfg.path) else "nothing there, so no"
        raise ConfigError(f"{cfg.path}: {found} metadata.json or manifest.json; inspect takes shards, an sae.pt, or a run.")
    print(table(dict(describe_sae(cfg.path))))


def describe_shards(dpath: Path) -> list[tuple[str, str]]:
    """Check the sizes of all shards, and a sample of images in every layer for NaN and infinity."""
    lines: list[tuple[str, str]] = []
    for layer in read_layers(dpath):
        shards = Shards.open(dpath, layer)
        if not lines:
            shards.check_files()
            n_bytes = sum((dpath / name).stat().st_size for name in shards.names)
            lines += [
                ("shards", f"{dpath}: protocol {shards.protocol}, {len(shards.names):,} files, {gb(n_bytes)}, all long enough"),
                ("model", f"{shards.family} {shards.ckpt}, width {shards.d_model:,}"),
                (
                    "images",
                    f"{shards.n_examples:,} × {shards.n_patches:,} patches{', and a CLS token' if shards.cls_token else ''}",
                ),
                ("pictures", shards.dataset or "the metadata does not say where"),
            ]
        acts_bd, n_imgs = _sample(shards)
        lines.append((f"layer {layer}", f"finite in {n_imgs:,} sampled images: {_moments(acts_bd)}"))
    return lines


def describe_sae(fpath: Path) -> list[tuple[str, str]]:
    """Load the checkpoint, which checks names, shapes and values."""
    sae = load_saev(fpath)
    return [
        ("SAE", f"{fpath}: {sae.source}, {gb(fpath.stat().st_size)}"),
        ("sizes", f"{sae.d_model:,} -> {sae.d_sae:,} features"),
        ("activation", str(sae.activation)),
        ("encodes", f"{'x - b_dec' if sae.pre_bias else 'x'} @ W_enc + b_enc (--pre-bias and --no-pre-bias set it)"),
        ("W_enc", _moments(sae.w_enc_ds)),
        ("b_enc", _moments(sae.b_enc_s)),
        ("W_dec", f"{_moments(sae.w_dec_sd)}; row norms {_moments(sae.w_dec_sd.norm(dim=1))}"),
        ("b_dec", _moments(sae.b_dec_d)),
    ]


def describe_run(dpath: Path) -> list[tuple[str, str]]:
    """Check a run's slots against the promises: order, bounds, and the same places filled in all three."""
    store = Run(dpath)
    manifest = store.manifest()
    if manifest is None:
        return [("run", f"{dpath}: unfinished (there is no manifest.json); run the same extract again")]
    metrics, shards, sae = (manifest.sub(name) for name in ("metrics", "shards", "sae"))
    n_imgs, n_patches = shards.get("n_examples", int), shards.get("n_patches", int)
    top_k = manifest.sub("config").get("top_k", int)
    shape = (sae.get("d_sae", int), top_k)
    values, imgs, patches = (store.load_tensor(f"{stem}.pt", shape) for stem in ("top_values", "top_img_i", "top_patch_i"))
    filled = imgs >= 0
    sound = {
        "scores are in descending order": bool((values[:, 1:] <= values[:, :-1]).all()),
        "filled slots have scores above zero": bool((values[filled] > 0).all()),
        "empty slots hold -inf and -1": bool(values[~filled].isneginf().all() and (patches[~filled] == -1).all()),
        "images and patches exist": bool(
            (imgs < n_imgs).all() and (patches < n_patches).all() and (patches[filled] >= 0).all()
        ),
    }
    if broken := [claim for claim, holds in sound.items() if not holds]:
        raise RunError(
            f"{dpath}: it should hold that {' and that '.join(broken)}, and does not. Run extract again with --force."
        )
    n_dead = metrics.get("n_dead", int)
    return [
        ("run", f"{dpath}: finished, slots are sound"),
        ("tokens", f"{metrics.get('n_tokens', int):,} of {n_imgs:,} images × {n_patches:,} patches"),
        ("SAE", f"{sae.get('source', str)}, {shape[0]:,} features: {sae.get('path', str)}"),
        ("shards", f"layer {shards.get('layer', int)} of {shards.get('path', str)}"),
        ("slots", f"{int(filled.sum()):,} of {filled.numel():,} filled, top_k {top_k}"),
        ("L0", f"{metrics.get('l0', float):.1f}; dead features {n_dead:,} ({n_dead / shape[0]:.1%})"),
        ("world size", str(manifest.get("world_size", int))),
    ]


DESCRIBERS: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "metadata.json": describe_shards,
    "manifest.json": describe_run,
    "partials": describe_run,
}


def _sample(shards: Shards) -> tuple[Tensor, int]:
    """Activations of some images, evenly spread, float32 (tokens, d_model), and how many images."""
    plan = Plan(shards.examples, 1)
    step = -(-plan.n_batches // N_SAMPLED)
    parts = []
    for index in range(0, plan.n_batches, step):
        buffer = torch.empty(shards.content_bytes // FLOAT_BYTES)
        read_batch(shards, plan[index], buffer)
        acts_bd = buffer.view(shards.n_patches, shards.d_model)
        if not torch.isfinite(acts_bd).all():
            raise find_bad_value(acts_bd, plan[index], shards, NO_LIMIT)
        parts.append(acts_bd)
    return torch.cat(parts), len(parts)


def _moments(tensor: Tensor) -> str:
    low, high = torch.aminmax(tensor)
    return (
        f"mean {float(tensor.mean()):.3g}, std {float(tensor.std(correction=0)):.3g}, in {float(low):.3g} … {float(high):.3g}"
    )
