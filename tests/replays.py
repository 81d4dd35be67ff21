"""Runs, pictures and replays for tests."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from saev_dist import extract
from saev_dist.config import Extract, Replay
from tests.synthetic import RELU, make_acts, make_sae, make_shards

N_IMGS, N_PATCHES = 23, 6


def make_pictures(dpath: Path, n: int = N_IMGS, size: tuple[int, int] = (60, 40)) -> Path:
    """Class folders of noise: every picture differs from every other in every pixel's neighbourhood."""
    for i in range(n):
        fpath = dpath / f"class{i * 3 // n}" / f"{i:03d}.png"
        fpath.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).save(fpath)
    return dpath


def make_run(tmp_path: Path, activation: dict = RELU, **settings) -> Path:
    acts = make_acts(N_IMGS, N_PATCHES)
    shards = make_shards(tmp_path / "shards", acts, layers=(2, 4), cls_token=True)
    sae = make_sae(tmp_path / "sae.pt", activation)
    out = tmp_path / "run"
    few = {"n_distributions": 2}  # matplotlib takes its time for each
    extract.run(Extract(shards=shards, sae=sae, out=out, layer=4, top_k=9, progress=False, **few | settings))
    return out


def make_replay(run: Path, **settings) -> Replay:
    return Replay(**{"run": run, "progress": False, "image_format": "png", "workers": 1, "all": True, "n_images": 3} | settings)


def tree(dpath: Path) -> dict[str, str]:
    """SHA-256 of every file below."""
    return {
        str(fpath.relative_to(dpath)): hashlib.sha256(fpath.read_bytes()).hexdigest()
        for fpath in sorted(dpath.rglob("*"))
        if fpath.is_file()
    }
