"""The whole pipeline on real photographs, with no download: `saev-dist demo`.

    photographs ──cut──▶ images/ ──embed──▶ shards/ ──train──▶ sae.pt ──extract──▶ run/ ──replay──▶ gallery

Only `extract` and `replay` are the tool; what comes before makes, in small, what a user already has. The photographs are
those in scikit-image's wheel. Their "model" is one fixed linear layer: local patches of colour, whitened. Sparse
codes of such patches are known to be oriented edges and colours (Olshausen & Field, Nature 381, 1996), so a
stranger can tell from the picture whether the numbers are right.

Names: `e` images, `p` patches, `x` values of a patch with its surroundings, `d` activation width, `b` tokens,
`s` features, `k` slots.
"""

import importlib.util
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import trange

from saev_dist import extract, replay
from saev_dist.config import Demo, Extract, Replay
from saev_dist.data.images import list_images
from saev_dist.data.shards import ShardWriter
from saev_dist.errors import ConfigError, Preempted, RunError
from saev_dist.files import replacing, writing
from saev_dist.machine import one_thread
from saev_dist.render.sheet import Row, Slot, contact_sheet
from saev_dist.sae.saev import load_saev, save_saev
from saev_dist.store import Run

TELL_S = 10.0  # from one line on the training to the next, where there is no terminal
# Photographs in the wheel, and the scale at which their structure is as large as a patch.
PHOTOGRAPHS = {
    "astronaut.png": 1.0,
    "brick.png": 1.0,
    "camera.png": 1.0,
    "chelsea.png": 1.0,
    "coffee.png": 1.0,
    "coins.png": 1.0,
    "grass.png": 1.0,
    "gravel.png": 1.0,
    "hubble_deep_field.jpg": 0.5,
    "ihc.png": 1.0,
    "moon.png": 1.0,
    "motorcycle_left.png": 1.0,
    "page.png": 1.0,
    "retina.jpg": 0.5,
    "rocket.jpg": 1.0,
    "text.png": 1.0,
}
CROP_PX, PATCH_PX, CONTEXT_PX = 96, 8, 16
GRID = CROP_PX // PATCH_PX
MARGIN_PX = (CONTEXT_PX - PATCH_PX) // 2
D_MODEL, D_SAE, TOP_K = 64, 512, 4
BATCH_TOKENS, LEARNING_RATE = 1024, 1.5e-3
DEAD_AFTER_TOKENS, N_REVIVED, REVIVE_WEIGHT = 30_000, 32, 1 / 4
N_SLOTS, N_ROWS, N_SHOWN, N_IN_GALLERY = 32, 12, 8, 88
MAX_PER_PHOTOGRAPH, MAX_COSINE = 4, 0.15


def run(cfg: Demo) -> None:
    """Make everything under `cfg.out`, and say where the picture is.

    Raises:
        ConfigError: scikit-image is not installed.
        RunError: `cfg.out` holds something else.
    """
    try:
        with writing(cfg.out):
            _run(cfg, photographs_dpath())
    except Preempted:
        raise Preempted("the demo was stopped by a signal; run it again, and it starts over.") from None


def _run(cfg: Demo, source_dpath: Path) -> None:
    """The steps, as it prints them."""
    sheet_fpath = cfg.out / "contact-sheet.png"
    settings = f"seed {cfg.seed}, {cfg.n_steps} steps\n"
    marker_fpath = cfg.out / "demo.txt"  # says that the directory is a demo's, and of which settings
    if cfg.out.is_file():
        raise RunError(f"{cfg.out} is a file; --out takes a directory to make.")
    if cfg.out.exists() and any(cfg.out.iterdir()):
        if not marker_fpath.exists():
            raise RunError(f"{cfg.out} holds files that are not a demo's; choose another --out.")
        if not cfg.force and (there := marker_fpath.read_text()) != settings:
            raise RunError(
                f"{cfg.out} holds a demo of {there.strip()}; this one is of {settings.strip()}. "
                "Choose another --out, or use --force."
            )
        if sheet_fpath.exists() and not cfg.force:
            page_fpath = cfg.out / "run" / "visuals" / "index.html"
            print(f"{cfg.out} holds this demo, finished: open {page_fpath}. (--force makes it again.)")
            return
        # The writer refuses to replace shards. Everything else is overwritten in place: nothing of a user's is removed.
        (cfg.out / "shards" / "metadata.json").unlink(missing_ok=True)
    cfg.out.mkdir(parents=True, exist_ok=True)
    sheet_fpath.unlink(missing_ok=True)
    marker_fpath.write_text(settings)

    images_dpath, shards_dpath, sae_fpath = cfg.out / "images", cfg.out / "shards", cfg.out / "sae.pt"
    print(f"1. Cut the photographs of scikit-image into images of {CROP_PX} px: {images_dpath}", flush=True)
    made_fpaths = cut(source_dpath, images_dpath)
    fpaths = list_images(images_dpath)
    if strangers := set(fpaths).difference(made_fpaths):
        raise RunError(f"{min(strangers)} is not an image of the demo; move it out of {images_dpath}.")
    crops_e = np.stack([np.asarray(Image.open(fpath)) for fpath in fpaths])
    print(
        f"2. Embed the {GRID} × {GRID} patches of each of {len(fpaths)} images in {D_MODEL} dimensions: {shards_dpath}",
        flush=True,
    )
    acts_epd = embed(crops_e)
    write_shards(acts_epd, shards_dpath, images_dpath)
    print(f"3. Train an SAE of {D_SAE} features, {TOP_K} active per patch: {sae_fpath}", flush=True)
    began = time.monotonic()
    with one_thread():  # products are small: two threads gain little, and on a busy machine wait for each other
        train(acts_epd.flatten(0, 1), sae_fpath, cfg)
    print(f"   {cfg.n_steps:,} steps in {time.monotonic() - began:.1f} s", flush=True)

    job = Extract(
        shards=shards_dpath,
        sae=sae_fpath,
        out=cfg.out / "run",
        top_k=N_SLOTS,
        rank_by="image",
        metrics=True,
        force=True,
        progress=cfg.progress,
    )
    print("4. Extract, as you would on your own shards:")
    command = f"saev-dist extract --shards {_quoted(shards_dpath)} --sae {_quoted(sae_fpath)} --out {_quoted(job.out)}"
    print(f"   $ {command} --top-k {job.top_k} --rank-by {job.rank_by} --metrics", flush=True)
    extract.run(job)

    chosen, rows = choose_rows(job.out, fpaths, crops_e)
    header = (
        f"{len(rows)} of {D_SAE} features of a sparse autoencoder, and the {N_SHOWN} images that drive each one hardest",
        "Each pair shows the winning patch with its surroundings, enlarged, and the image it lies in. A feature is one row:",
        "what its patches share (an edge at one angle, a colour on one side, a texture) is what the feature means.",
    )
    gallery = Replay(
        run=job.out,
        images=images_dpath,
        features=tuple(chosen),
        n_features=N_IN_GALLERY,
        n_images=N_SHOWN,
        patch_size=PATCH_PX,
        img_scale=2.0,
        force=True,
        progress=cfg.progress,
    )
    print("5. Replay: encode the winning images again, check their scores, draw heatmaps:")
    command = f"saev-dist replay --run {_quoted(gallery.run)} --images {_quoted(images_dpath)}"
    command += f" --n-features {gallery.n_features}"
    command += f" --n-images {gallery.n_images} --patch-size {gallery.patch_size} --img-scale {gallery.img_scale:g}"
    print(f"   $ {command} --features {' '.join(map(str, chosen))}", flush=True)
    replay.run(gallery)
    with replacing(sheet_fpath) as file:  # last: it marks the demo as finished
        Image.fromarray(contact_sheet(rows, header)).save(file, format="PNG")
    print(f"6. Open {gallery.run / 'visuals' / 'index.html'} in a browser: the gallery of features.")
    print(f"   Or look at {sheet_fpath}: a row is a feature, its strongest images side by side.")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def photographs_dpath() -> Path:
    """The folder of scikit-image's bundled photographs; it is not imported, so that nothing is ever fetched."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the demo needs the photographs in scikit-image: pip install scikit-image.")
    dpath = Path(spec.submodule_search_locations[0]) / "data"
    if missing := [name for name in PHOTOGRAPHS if not (dpath / name).is_file()]:
        raise ConfigError(f"{dpath / missing[0]} is not part of this scikit-image; the demo was made with 0.26.")
    return dpath


def cut(source_dpath: Path, images_dpath: Path) -> list[Path]:
    """Cut each photograph into crops that do not overlap: a class folder each, as in an image folder of a user."""
    made_fpaths = []
    for name, scale in PHOTOGRAPHS.items():
        try:
            photograph = Image.open(source_dpath / name).convert("RGB")
        except OSError as err:  # Pillow's own are, too
            raise ConfigError(f"{source_dpath / name}: {err.strerror or err}. Install scikit-image again.") from None
        size = round(photograph.width * scale), round(photograph.height * scale)
        photograph = photograph.resize(size, Image.Resampling.LANCZOS)
        class_dpath = images_dpath / Path(name).stem
        class_dpath.mkdir(parents=True, exist_ok=True)
        n_columns, n_rows = size[0] // CROP_PX, size[1] // CROP_PX
        left, top = (size[0] - n_columns * CROP_PX) // 2, (size[1] - n_rows * CROP_PX) // 2
        for row in range(n_rows):
            for column in range(n_columns):
                x, y = left + column * CROP_PX, top + row * CROP_PX
                made_fpaths.append(class_dpath / f"r{row}c{column}.png")
                photograph.crop((x, y, x + CROP_PX, y + CROP_PX)).save(made_fpaths[-1])
    return made_fpaths


def embed(crops_e: NDArray[np.uint8]) -> Tensor:
    """Activations of every patch: its pixels and some around them, under a Gaussian window, whitened.

    Args:
        crops_e: uint8 (images, CROP_PX, CROP_PX, 3).

    Returns:
        float32 (images, GRID * GRID, D_MODEL), patches row by row. Norms are brought to sqrt(D_MODEL), so that contrast
        does not decide; flat patches stay small.
    """
    pixels = torch.from_numpy(crops_e).permute(0, 3, 1, 2).float() / 255
    padded = F.pad(pixels, (MARGIN_PX,) * 4, mode="replicate")
    x_bx = F.unfold(padded, CONTEXT_PX, stride=PATCH_PX).transpose(1, 2).flatten(0, 1)
    gauss = torch.exp(-((torch.arange(CONTEXT_PX) - (CONTEXT_PX - 1) / 2) ** 2) / (2 * 4.0**2))
    x_bx = (x_bx - x_bx.mean(0)) * torch.outer(gauss, gauss).flatten().repeat(3)
    variance, axes = torch.linalg.eigh(x_bx.T @ x_bx / len(x_bx))
    variance_d, axes_xd = variance.flip(0)[:D_MODEL], axes.flip(1)[:, :D_MODEL]
    # Damped: full whitening blows the finest axes, mostly noise, up to the size of the edges.
    acts_bd = x_bx @ (axes_xd / (variance_d + 4 * variance_d[D_MODEL // 2]).sqrt())
    norm_b = acts_bd.norm(dim=1, keepdim=True)
    acts_bd *= math.sqrt(D_MODEL) / norm_b.clamp(min=float(norm_b.median()))
    acts_epd: Tensor = acts_bd.view(len(crops_e), GRID * GRID, D_MODEL)
    return acts_epd


def write_shards(acts_epd: Tensor, shards_dpath: Path, images_dpath: Path) -> None:
    """Write the activations as four shards."""
    with ShardWriter(
        shards_dpath,
        family="demo",
        ckpt="whitened-patches",
        layers=[0],
        content_tokens_per_example=acts_epd.shape[1],
        d_model=D_MODEL,
        cls_token=False,
        max_tokens_per_shard=-(-acts_epd.shape[0] // 4) * acts_epd.shape[1],
        dataset=images_dpath.absolute(),  # wherever `replay` is called
        data={"__class__": "ImageFolder", "root": str(images_dpath.absolute())},
    ) as writer:
        writer.write(acts_epd[:, None].numpy())


def train(acts_bd: Tensor, sae_fpath: Path, cfg: Demo) -> None:
    """Train a TopK SAE with Adam; features that have not fired for long learn from the error that the others leave.

    The auxiliary loss is that of Gao et al., "Scaling and evaluating sparse autoencoders" (2024), section 2.4.
    """
    random = torch.Generator().manual_seed(cfg.seed)
    w_dec = F.normalize(acts_bd[torch.randint(len(acts_bd), (D_SAE,), generator=random)], dim=1)
    w_enc, b_enc, b_dec = w_dec.T.clone(), torch.zeros(D_SAE), acts_bd.mean(0)
    weights = [tensor.requires_grad_() for tensor in (w_enc, b_enc, w_dec, b_dec)]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, betas=(0.9, 0.99))
    idle_s = torch.zeros(D_SAE, dtype=torch.int64)
    is_shown = cfg.progress and sys.stderr.isatty()
    told = time.monotonic()
    for step in trange(cfg.n_steps, desc="train", unit="step", disable=not is_shown):
        if cfg.progress and not is_shown and time.monotonic() - told > TELL_S:
            told = time.monotonic()
            print(f"   {step:,} of {cfg.n_steps:,} steps", flush=True)
        x_bd = acts_bd[torch.randint(len(acts_bd), (BATCH_TOKENS,), generator=random)]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 50, (cfg.n_steps - step) / (0.3 * cfg.n_steps))
        h_bs = x_bd @ w_enc + b_enc
        value_bk, feature_bk = h_bs.topk(TOP_K, dim=1)
        error_bd = x_bd - torch.zeros_like(h_bs).scatter(1, feature_bk, value_bk) @ w_dec - b_dec
        loss = error_bd.square().mean()
        idle_s += BATCH_TOKENS
        idle_s[feature_bk.flatten()] = 0
        dead = (idle_s > DEAD_AFTER_TOKENS).nonzero().squeeze(1)
        if len(dead):
            value_bk, feature_bk = h_bs[:, dead].topk(min(N_REVIVED, len(dead)), dim=1)
            revived_bs = torch.zeros(len(x_bd), len(dead)).scatter(1, feature_bk, value_bk)
            loss = loss + REVIVE_WEIGHT * (error_bd.detach() - revived_bs @ w_dec[dead]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=1, keepdim=True)
    save_saev(sae_fpath, w_enc, b_enc, w_dec, b_dec, {"cls": "TopK", "params": {"top_k": TOP_K}})


def choose_rows(run_dpath: Path, fpaths: list[Path], crops_e: NDArray[np.uint8]) -> tuple[list[int], list[Row]]:
    """A dozen features for the sheet, from the artifacts alone: their numbers, and their rows.

    Strongest eighth score first; of those that fire on 0.05 to 5 % of patches, whose top images come at most
    MAX_PER_PHOTOGRAPH from one photograph and share at most two with a feature chosen before, and whose decoder
    direction is at about right angles to those of all chosen before (cosine within ±MAX_COSINE).
    """
    store, shape = Run(run_dpath), (D_SAE, N_SLOTS)
    values_sk, imgs_sk, patches_sk = (
        store.load_tensor(f"{stem}.pt", shape).numpy() for stem in ("top_values", "top_img_i", "top_patch_i")
    )
    frequency_s = store.load_tensor("sparsity.pt", (D_SAE,)).numpy()
    photograph_e = np.unique([fpath.parent.name for fpath in fpaths], return_inverse=True)[1]
    directions_sd = F.normalize(load_saev(run_dpath.parent / "sae.pt").w_dec_sd, dim=1)
    chosen: list[int] = []
    for s in np.argsort(-values_sk[:, N_SHOWN - 1], kind="stable").tolist():
        images = imgs_sk[s, :N_SHOWN]
        if len(chosen) == N_ROWS or images.min() < 0 or not 5e-4 <= frequency_s[s] <= 0.05:
            continue
        if np.bincount(photograph_e[images]).max() > MAX_PER_PHOTOGRAPH:
            continue
        if len(chosen) and (directions_sd[chosen] @ directions_sd[s]).abs().max() > MAX_COSINE:
            continue
        if all(len(np.intersect1d(images, imgs_sk[other, :N_SHOWN])) <= 2 for other in chosen):
            chosen.append(s)
    return chosen, [
        Row(
            title=f"feature {s}",
            lines=(
                f"fires on {frequency_s[s]:.2%}",
                f"strongest {values_sk[s, 0]:.2f}",
                f"{N_SHOWN}th {values_sk[s, N_SHOWN - 1]:.2f}",
            ),
            slots=[
                Slot(crops_e[img_i], _context_box(int(patch_i)))
                for img_i, patch_i in zip(imgs_sk[s, :N_SHOWN], patches_sk[s, :N_SHOWN], strict=True)
            ],
        )
        for s in chosen
    ]


def _context_box(patch_i: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a patch with its surroundings."""
    row, column = divmod(patch_i, GRID)
    left, top = column * PATCH_PX - MARGIN_PX, row * PATCH_PX - MARGIN_PX
    return left, top, left + CONTEXT_PX, top + CONTEXT_PX
