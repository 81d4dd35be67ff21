"""Replay over its ceilings: `python -m tests.bench.replay`.

    encode   images per second of `reencode` (read, encode, verify) over the bare matrix product of the same tokens with all
             features, of which an SAE that looks at each by itself needs those alone that won in an image
    verify   the same of `verify_tokens`, which reads whole images, over the product of the tokens that won
    draw     heatmaps per second of one drawing process over bare Pillow: decode, resize, and encode the same files
    memory   peak resident memory of `saev-dist replay` above the imports, by number of features, and of a drawing process

The scores are verified by `reencode` itself, the pictures are counted. One JSON line on stdout.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from saev_dist import draw, extract
from saev_dist.choose import choose_slots, deal
from saev_dist.config import Extract
from saev_dist.finished import FinishedRun
from saev_dist.reencode import Check, reencode, verify_tokens
from saev_dist.render.geometry import Geometry
from saev_dist.render.plots import plasma
from saev_dist.sae.encoder import Encoder
from tests.bench.extract import PRODUCT, Case, bare_product_s, make_inputs, read_all
from tests.bench.record import emit

MEMORY = """
import json, sys, threading, time
from contextlib import suppress
from pathlib import Path
import saev_dist.replay
from saev_dist.config import Replay
def peak(pid="self"):
    return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])
def watch():  # not by multiprocessing, which would take notice of their ends
    while True:
        for fpath in Path("/proc/self/task").glob("*/children"):
            with suppress(OSError, IndexError):  # one may end meanwhile
                drawing.update((pid, peak(pid)) for pid in fpath.read_text().split())
        time.sleep(0.02)
drawing, before = {}, peak()  # by process; a fork has its parent's peak until it becomes another program
threading.Thread(target=watch, daemon=True).start()
run, images, n = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
saev_dist.replay.run(Replay(run=run, images=images, n_features=n, n_images=8, progress=False, force=True))
print(json.dumps([peak() - before, max(drawing.values())]))
"""


def make_pictures(dpath: Path, n: int) -> Path:
    """Smooth noise, JPEG, 500 x 375: decodes and compresses like a photograph."""
    dpath.mkdir()
    for i in range(n):
        small = np.random.default_rng(i).integers(0, 255, (24, 32, 3)).astype(np.uint8)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(dpath / f"{i:05d}.jpg")
    return dpath


def encode_shares(run: FinishedRun, shards: Path, rounds: int, n_features: int, *, to_draw: bool) -> list[float]:
    """Seconds of the bare product over those of `reencode`, or of `verify_tokens`, for what so many features need."""
    features = np.linspace(0, run.sae.d_sae, n_features, endpoint=False).astype(int).tolist()
    slots = deal(choose_slots(features, run.values_sk, run.imgs_sk, run.patches_sk, None), 1)[0]
    images, n_patches = np.unique(slots["img_i"]), run.shards.n_patches
    if to_draw:
        token_t = (images[:, None] * n_patches + np.arange(n_patches)).ravel()
    else:
        token_t = np.unique(slots["img_i"] * n_patches + slots["patch_i"])
    acts_td = read_all(shards)[torch.from_numpy(token_t)]
    shares = []
    for _ in range(rounds):
        ceiling_s = bare_product_s(acts_td, run.sae.w_enc_ds, run.sae.b_enc_s, 16_384)
        check, began = Check(), time.perf_counter()
        with Encoder(run.sae, torch.device("cpu"), "fp32", torch.get_num_threads()) as encoder:
            if to_draw:
                n_images = sum(1 for _ in reencode(run, slots, encoder, check, read_ahead=16, look=lambda: None))
            else:
                n_images = sum(1 for _ in verify_tokens(run, slots, encoder, check, read_ahead=16, look=lambda: None))
        shares.append(ceiling_s / (time.perf_counter() - began))
        assert n_images == len(images) and check.n_slots == len(slots)
    return shares


def draw_shares(images: Path, n: int, rounds: int) -> tuple[list[float], float]:
    """Seconds of bare Pillow over those of `draw.draw`, and heatmaps per second of the latter."""
    shares, per_s = [], 0.0
    names = sorted(path.name for path in images.iterdir())[:n]
    values_mp = np.random.default_rng(0).random((2, 196)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        geometry = Geometry(fit="crop", n_patches=196)
        draw.start(
            draw.Drawing(
                out_dpath=Path(name),
                root=images,
                in_data_set=False,
                geometry=geometry,
                colours_c3=plasma(),
                format="webp",
                quality=80,
            )
        )

        def bare_s(names: list[str]) -> float:
            began = time.perf_counter()
            for fname in names:
                picture = Image.open(images / fname).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
                for _ in range(1 + len(values_mp)):
                    picture.crop((16, 16, 240, 240)).save(io.BytesIO(), "WEBP", quality=80, method=2)
            return time.perf_counter() - began

        bare_s(names[:1])  # it loads what reads and writes pictures
        ceilings = [bare_s(names)]
        for _ in range(rounds):
            began = time.perf_counter()
            for i, fname in enumerate(names):
                task = draw.Task(img_i=i, name=fname, features=[0, 1], places=[i, i], uppers=[1.0, 1.0], values_mp=values_mp)
                draw.draw(task)
            seconds = time.perf_counter() - began
            ceilings.append(bare_s(names))
            shares.append((ceilings[-2] + ceilings[-1]) / 2 / seconds)
            per_s = max(per_s, len(values_mp) * len(names) / seconds)
        assert len(list(Path(name).rglob("*-heatmap.webp"))) == 2 * len(names)
    return shares, per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    case = Case(n_imgs=332, top_k=16)
    relu = replace(case, activation="Relu", l0=30)
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        images = make_pictures(dpath / "images", case.n_imgs)
        for each, measured in ((relu, ((50, True), (case.d_sae, True))), (case, ((100, False), (case.d_sae, True)))):
            shutil.rmtree(dpath / "shards", ignore_errors=True)
            shards, sae = make_inputs(dpath, each)
            on = {"shards": shards, "sae": sae, "out": dpath / "run", "top_k": case.top_k, "device": "cpu"}
            extract.run(Extract(**on, progress=False, force=True))
            for n_features, to_draw in measured:
                shares = encode_shares(FinishedRun.open(dpath / "run"), shards, args.rounds, n_features, to_draw=to_draw)
                emit(
                    "replay",
                    f"{'replay: images' if to_draw else 'verify: tokens'} of {n_features:,} features, {each.activation}",
                    asdict(each),
                    ceiling=PRODUCT,
                    share=median(shares),
                    shares=[round(share, 3) for share in shares],
                )
        drawn, heatmaps_per_s = draw_shares(images, 60, args.rounds)
        peaks = {}
        for n_features in (50, 400, 1600):
            command = [sys.executable, "-c", MEMORY, dpath / "run", images, str(n_features)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[n_features] = [round(n_bytes / 1e6) for n_bytes in json.loads(done.stdout.splitlines()[-1])]
    pillow = "bare Pillow: decode, resize, encode the same files"
    emit(
        "replay",
        "replay: heatmaps drawn",
        asdict(case),
        ceiling=pillow,
        share=median(drawn),
        shares=[round(share, 3) for share in drawn],
        heatmaps_per_s_and_process=round(heatmaps_per_s),
    )
    what = "replay: peak memory above the imports, and all of a drawing process"
    emit("replay", what, asdict(case), peak_mb_by_n_features=peaks)


if __name__ == "__main__":
    main()
