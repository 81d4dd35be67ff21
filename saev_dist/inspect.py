"""`saev-dist inspect PATH`: what a shards directory, an SAE checkpoint or a run holds, and whether it is sound."""

import json
import os
import shlex
from pathlib import Path

import torch
from torch import Tensor

from saev_dist.config import Inspect
from saev_dist.data.reader import sample_images
from saev_dist.data.shards import Shards, read_layers
from saev_dist.errors import ConfigError, RunError, UnknownFormatError
from saev_dist.files import refuse_lacking
from saev_dist.finished import check_slots
from saev_dist.output import gb, table
from saev_dist.report import describe_kept, describe_left_out, flags_of
from saev_dist.sae.hub import is_hub_name, refuse_link
from saev_dist.sae.load import Loaded, Overrides, load_sae, recognise
from saev_dist.sae.model import Threshold
from saev_dist.selfcheck import examine
from saev_dist.store import Run

N_SAMPLED = 32


def run(cfg: Inspect) -> None:
    """Describe and check what is at `cfg.path`.

    Raises:
        SaevDistError: it is none of the three, or not sound; the message names what is wrong.
    """
    if os.path.exists(cfg.path / "metadata.json"):
        _refuse_flags(cfg, "a directory of shards", without={"path", "layer"})
        print(table(dict(describe_shards(cfg.path, cfg.layer))))
        return
    if os.path.exists(cfg.path / "manifest.json") or os.path.exists(cfg.path / "partials"):
        _refuse_flags(cfg, "a run", without={"path"})
        print(table(dict(describe_run(cfg.path))))
        return
    if os.path.exists(cfg.path / "slurm/jobs.jsonl") and len(os.listdir(cfg.path)) == 1:
        raise ConfigError(
            f"{cfg.path} holds no run yet, only what the launcher wrote. What became of its job says: "
            f"python -m slurm.launch status --run {shlex.quote(str(cfg.path))}"
        )
    refuse_link(cfg.path)
    if not os.path.lexists(cfg.path) and not is_hub_name(cfg.path):
        raise ConfigError(f"{cfg.path} is not there; inspect takes a directory of shards, an SAE, or a run.")
    if cfg.layer is not None and cfg.shards is None:
        raise ConfigError(f"--layer {cfg.layer} is one of shards, and {cfg.path} is an SAE; name shards with --shards.")
    if os.path.isdir(cfg.path) and cfg.sae_format == "auto":
        try:
            recognise(cfg.path)
        except UnknownFormatError as err:
            raise UnknownFormatError(
                f"{err} Nor is it a directory of shards (metadata.json) or a run (manifest.json)."
            ) from None
    loaded = load_sae(cfg.path, Overrides.of(cfg))
    print(table(dict(describe_sae(loaded))))
    if cfg.shards is not None:
        shards = Shards.open(cfg.shards, cfg.layer)
        loaded.check_width(shards)
        if not loaded.sae.reconstructs:
            raise ConfigError(f"{cfg.path} ({loaded.sae.source}) predicts another activation than its input: nothing to check.")
        shards.check_files()
        print(examine(loaded.sae, shards, torch.device("cpu")))


def _refuse_flags(cfg: Inspect, what: str, *, without: set[str]) -> None:
    if given := flags_of(cfg, without=without):
        raise ConfigError(f"{shlex.join(given)} does not apply: {cfg.path} is {what}. Leave it out.")


def describe_shards(dpath: Path, only: int | None) -> list[tuple[str, str]]:
    """Check the sizes of all shards, and a sample of images in one layer, or in every one, for NaN and infinity."""
    lines: list[tuple[str, str]] = []
    for layer in read_layers(dpath) if only is None else [only]:
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
        sampled = list(sample_images(shards, N_SAMPLED))
        lines.append((f"layer {layer}", f"finite in {len(sampled):,} sampled images: {_moments(torch.cat(sampled))}"))
    return lines


def describe_sae(loaded: Loaded) -> list[tuple[str, str]]:
    """What a checkpoint that was loaded, and so checked, holds."""
    sae = loaded.sae
    lines = [
        ("SAE", f"{loaded.path}: {sae.source}"),
        ("format", loaded.sae_format),
        ("sizes", f"{sae.d_model:,} -> {sae.d_sae:,} features"),
        ("rules", ", ".join(f"{name} {json.dumps(value)}" for name, value in sae.rules().items())),
        ("W_enc", _moments(sae.w_enc_ds)),
        ("b_enc", _moments(sae.b_enc_s)),
        ("W_dec", f"{_moments(sae.w_dec_sd)}; row norms {_moments(sae.w_dec_sd.norm(dim=1))}"),
        ("b_dec", _moments(sae.b_dec_d)),
    ]
    if isinstance(sae.activation, Threshold) and isinstance(sae.activation.threshold, Tensor):
        lines.append(("threshold", _moments(sae.activation.threshold)))
    return lines


def describe_run(dpath: Path) -> list[tuple[str, str]]:
    """Check a run's files and slots, and tell what it is of."""
    store = Run(dpath)
    under_way, manifest = store.under_way(), store.manifest()
    if under_way is not None:
        holder = store.lock.holder()
        state = f"under way: {holder}" if holder else "unfinished; run the same extract again to continue"
        kept = describe_kept(store) + ("; snapshots add to it" if holder else "")
        return [
            ("run", f"{dpath}: {state}"),
            ("kept", kept),
        ]
    if manifest is None:
        raise RunError(f"{dpath} holds no manifest.json: it is not a run, or one that died before it began.")
    refuse_lacking(dpath, manifest)
    metrics, shards, sae = (manifest.sub(name) for name in ("metrics", "shards", "sae"))
    n_imgs, n_patches = shards.positive("n_examples"), shards.positive("n_patches")
    shape = (sae.positive("d_sae"), manifest.sub("config").positive("top_k"))
    values, imgs, patches = (store.load_tensor(f"{stem}.pt", shape) for stem in ("top_values", "top_img_i", "top_patch_i"))
    check_slots(store, manifest, values.numpy(), imgs.numpy(), patches.numpy())
    filled = imgs >= 0
    n_dead, n_tokens = metrics.count("n_dead", most=shape[0]), metrics.get("n_tokens", int)
    of_all = f" of {n_imgs:,}" if n_tokens < n_imgs * n_patches else ""
    return [
        ("run", f"{dpath}: finished, slots are sound"),
        ("tokens", f"{n_tokens:,}: {n_tokens // n_patches:,} images{of_all} × {n_patches:,} patches"),
        ("SAE", f"{sae.get('source', str)}, {shape[0]:,} features: {sae.get('path', str)}"),
        ("shards", f"layer {shards.get('layer', int)} of {shards.get('path', str)}"),
        ("slots", f"{int(filled.sum()):,} of {filled.numel():,} filled, top_k {shape[1]}"),
        ("L0", f"{metrics.get('l0', float):.1f}; dead features {n_dead:,} ({n_dead / shape[0]:.1%})"),
        ("world size", str(manifest.get("world_size", int))),
        ("gallery", describe_gallery(dpath)),
        *([("left out", left_out)] if (left_out := describe_left_out(manifest)) else []),
    ]


def describe_gallery(dpath: Path) -> str:
    """Whether a run has been drawn, and how to look at it."""
    fpath = dpath / "visuals" / "index.html"
    command = f"saev-dist replay --run {shlex.quote(str(dpath))}"
    is_partly = os.path.exists(dpath / "visuals.partial")
    if os.path.exists(fpath):
        if not _is_current(dpath):
            return f"{fpath} shows what was here before the last extract. Draw it again: {command}"
        another = " (another is drawn in part; the same replay goes on)" if is_partly else ""
        return f"{fpath}: open it in a browser{another}"
    return f"none{' (one is drawn in part)' if is_partly else ''}: {command}"


def _is_current(dpath: Path) -> bool:
    """Whether a run's gallery shows what the run holds now, and was not drawn before an `extract --force`."""
    try:
        drawn = json.loads((dpath / "visuals" / "replay.json").read_bytes())
        return bool(drawn["manifest_sha256"] == Run(dpath).manifest_sha256())
    except (OSError, ValueError, KeyError, TypeError):  # nobody can tell
        return True


def _moments(tensor: Tensor) -> str:
    low, high = torch.aminmax(tensor)
    return (
        f"mean {float(tensor.mean()):.3g}, std {float(tensor.std(correction=0)):.3g}, in {float(low):.3g} … {float(high):.3g}"
    )
