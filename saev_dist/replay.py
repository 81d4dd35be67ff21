"""Job 2: choose features, encode the images that won their slots again, draw heatmaps, write the gallery.

    slots -> choose features -> deal to ranks: read -> encode -> verify -> draw (worker processes) -> put together -> swap in

Everything is made in `<run>/visuals.partial/` and takes the name `visuals` when it is whole (see `visuals`):

    replay.json              what is being made; another replay's leftovers do not match it, and go
    records.<rank>.bin       what is drawn, and need not be again after a kill; see `records`
    features/<i>/            pictures, and data.js with the feature's scores
    index.html, data.js, features.parquet, features.csv, images.parquet, density.png, distributions.png

Run by `saev-dist replay`; see `config.Replay` for what a user can set.

Names: `s` features, `m` features of one image, `p` patches, `n` slots.
"""

import json
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saev_dist import __version__, draw
from saev_dist.choose import Slots, choose_features, choose_slots, deal
from saev_dist.config import Replay
from saev_dist.data.images import Pictures, open_pictures
from saev_dist.errors import RunError, warn
from saev_dist.estimate import free_disk, gb
from saev_dist.files import writing
from saev_dist.finished import FinishedRun, Statistics
from saev_dist.machine import cpu_threads, rank_cores
from saev_dist.progress import Progress
from saev_dist.records import Records
from saev_dist.reencode import Check, Image, describe_encoded, reencode
from saev_dist.render import gallery, plots, tables
from saev_dist.render.geometry import Geometry, default_fit
from saev_dist.report import flags_of, table
from saev_dist.sae.encoder import Encoder, usable_precision
from saev_dist.store import Run, agree
from saev_dist.visuals import Visuals
from saev_dist.world import World

INERT = {"config", "device", "workers", "read_ahead", "timeout_s", "dry_run", "force", "progress"}
"""Fields of the config that change nothing that is drawn."""
BYTES_PER_PX = {"webp": 0.2, "png": 1.8}
"""Of photographs, about. WebP at quality 80: 0.09 where the demo's are drawn twice as large, up to 0.3; PNG: 1.07 there, more
of sharper ones, which nobody has measured."""
BLOCK_BYTES = 4096
"""What a file takes at least."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a replay works on."""

    cfg: Replay
    finished: FinishedRun
    statistics: Statistics
    pictures: Pictures | None
    geometry: Geometry
    features: list[int]
    slots: Slots
    """The slots to draw, of all ranks."""
    identity: dict[str, Any]
    """What is drawn; JSON. Not part of it are the places of the inputs and the flags, which the page names."""

    @property
    def visuals(self) -> Visuals:
        return Visuals(self.cfg.run, self.identity)

    @property
    def records(self) -> Records:
        return Records(self.visuals.partial_dpath, self.finished.shards.n_patches, self.cfg.image_format)


def run(cfg: Replay) -> None:
    """Do the job in this process, as one rank of its world.

    Raises:
        SaevDistError: anything a user can mend; on every rank of the world.
    """
    # The lock is held until the others have left too: a rank that is still at work may write.
    with (
        ExitStack() as held,
        World(cfg.timeout_s) as world,
        world.obeying_signals(cfg.run / "visuals.partial", last="this image"),
    ):
        job = open_job(cfg)
        device = world.device(cfg.device)
        mend = "All ranks must see the same run and pictures; name a folder that they share."
        agree(world, job.identity, would="draw another gallery", mend=mend)
        if world.tell(world.rank == 0 and _is_done(job)):
            if world.rank == 0:
                job.visuals.tidy()
                print(_already_done(job))
            return
        if cfg.dry_run:
            if world.rank == 0:
                _announce(job)
                print(describe_plan(job))
            return
        # Two replays in one directory would mix their pictures, and an `extract --force` would change what is drawn.
        if world.rank == 0:
            held.enter_context(Run(cfg.run).lock(patience_s=world.patience_s, check=world.check))
        if world.rank == 0 and Run(cfg.run).manifest_sha256() != job.identity["manifest_sha256"]:
            raise RunError(f"{cfg.run} has changed: another process computed it again. Run again.")
        if world.rank == 0:
            job.visuals.bring_back()
        if world.tell(world.rank == 0 and _is_done(job)):  # since, by another process
            if world.rank == 0:
                print(_already_done(job))
            return
        if world.rank == 0:
            job.visuals.begin(afresh=cfg.force and not world.restarted)
            _announce(job)
        world.wait()
        for fpath in job.records.fpaths()[world.rank :: world.size]:
            job.records.keep_sound(fpath)
        world.wait()
        todo = job.records.missing(job.slots)
        if world.rank == 0:
            print(_describe_task(job, todo), flush=True)
        world.wait()  # nobody appends before all have read
        report = _draw(job, world, device, deal(todo, world.size)[world.rank])
        reports = world.collect(report)
        _write_features(job, job.features[world.rank :: world.size], world.check)
        world.wait()
        if world.local_rank == 0 and world.rank:  # rank 0 has the page to add
            job.visuals.sync()
        world.wait()
        if world.rank == 0:
            with writing(job.visuals.partial_dpath):
                _write_page(job)
            job.visuals.sync()
            world.check()
            job.visuals.publish()
        world.finish()
        if world.rank == 0:
            print(_summary(job, reports))


def open_job(cfg: Replay) -> Job:
    """Open and check what the config names, and choose."""
    manifest_sha256 = Run(cfg.run).manifest_sha256()
    finished = FinishedRun.open(cfg.run, shards=cfg.shards, sae=cfg.sae)
    finished.check_slots()
    shards = finished.shards
    statistics = finished.statistics()
    features = choose_features(
        statistics.log10_freq_s,
        statistics.log10_mean_s,
        statistics.max_s,
        always=cfg.features,
        n_features=cfg.n_features,
        sort=cfg.sort,
        every=cfg.all,
        log_freq_range=cfg.log_freq_range,
        log_value_range=cfg.log_value_range,
        seed=cfg.seed,
    )
    geometry = Geometry(
        fit=(
            default_fit(shards.family, shards.n_patches, crop=cfg.crop, patch_size=cfg.patch_size)
            if cfg.fit == "auto"
            else cfg.fit
        ),
        n_patches=shards.n_patches,
        patch_size=cfg.patch_size,
        grid=cfg.grid,
        resize=cfg.resize,
        crop=cfg.crop,
        keep_aspect=cfg.keep_aspect,
        img_scale=cfg.img_scale,
    )
    pictures = None
    if cfg.pictures:
        root = cfg.images or (Path(shards.dataset) if shards.dataset and os.path.isdir(shards.dataset) else None)
        pictures = open_pictures(root, shards.n_examples) if root else None
    identity = {
        "manifest_sha256": manifest_sha256,
        "images": [str(pictures.root.absolute()), pictures.kind, pictures.fingerprint()] if pictures else None,
        "geometry": asdict(geometry),
        "features": features,
        "n_images": cfg.n_images,
        "format": [cfg.image_format, cfg.quality],
        "version": __version__,
    }
    slots = choose_slots(features, finished.values_sk, finished.imgs_sk, finished.patches_sk, cfg.n_images)
    return Job(
        cfg=cfg,
        finished=finished,
        statistics=statistics,
        pictures=pictures,
        geometry=geometry,
        features=features,
        slots=slots,
        identity=json.loads(json.dumps(identity)),
    )


def _is_done(job: Job) -> bool:
    return not job.cfg.force and job.visuals.is_done()


def _already_done(job: Job) -> str:
    return f"{job.visuals.dpath / 'index.html'} is this gallery, finished: open it. (--force draws it again.)"


def _announce(job: Job) -> None:
    """Say what the user may not have meant, while there is time to stop."""
    dataset = job.finished.shards.dataset
    if job.cfg.pictures and job.pictures is None and dataset:
        warn(
            f"{job.finished.shards.dpath} names {dataset} for its pictures, which is no folder here: heatmaps will be on a "
            "plain ground. --images names another, --no-pictures asks for none."
        )
    if job.pictures and (found := job.pictures.out_of_number()):
        img_i, name = found
        warn(
            f"{job.pictures.root}: pictures go by the order of their names, so image {img_i} is {job.pictures.name(img_i)}, "
            f"and not {name}. If the shards were written in the order of the numbers, pad these with zeros."
        )
    if (need := _disk(job)) > (free := free_disk(job.cfg.run)):
        warn(
            f"the pictures may take about {gb(need)} of disk; {gb(free)} are free at {job.cfg.run}. Lower --n-features, "
            "--n-images or --img-scale, or free some."
        )
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or no one can tell
        n_features = len(json.loads((job.visuals.dpath / "replay.json").read_bytes())["features"])
        print(
            f"{job.visuals.dpath} has a gallery of {n_features:,} features; this one of {len(job.features):,} will replace it."
        )


def describe_plan(job: Job) -> str:
    """What --dry-run prints."""
    n_pictures = _count_pictures(job, job.slots)
    lines = {
        "features": f"{len(job.features):,} of {job.finished.sae.d_sae:,}",
        "images": f"{len(np.unique(job.slots['img_i'])):,} to encode again, of {job.finished.shards.n_examples:,}",
        "to draw": f"{n_pictures:,} pictures, each with and without heatmap",
        "pictures": _ground(job),
        "fit": job.geometry.describe(with_pictures=job.pictures is not None),
        "disk": f"about {gb(_disk(job))} in {2 * n_pictures + len(job.features):,} files; {gb(free_disk(job.cfg.run))} free",
        "gallery": str(job.visuals.dpath / "index.html"),
    }
    return table(lines) + "\ndry run: nothing was encoded or written."


def _disk(job: Job) -> int:
    """About what the features take on the disk."""
    per_px = BYTES_PER_PX[job.cfg.image_format] if job.pictures else 0.0  # a plain ground is next to nothing
    picture = max(BLOCK_BYTES, round(per_px * job.geometry.shown_px))
    return 2 * _count_pictures(job, job.slots) * picture + len(job.features) * BLOCK_BYTES


def _count_pictures(job: Job, slots: Slots) -> int:
    return len(np.unique(slots["img_i"] * job.finished.sae.d_sae + slots["feature"]))


def _describe_task(job: Job, todo: Slots) -> str:
    """What is to be drawn, and what an earlier attempt has drawn."""
    n_all, n_left = _count_pictures(job, job.slots), _count_pictures(job, todo)
    task = f"{len(job.features):,} features: {n_all:,} pictures, each with and without heatmap, of "
    task += f"{len(np.unique(job.slots['img_i'])):,} images; about {gb(_disk(job))}"
    if n_left < n_all:
        task += f"; {n_all - n_left:,} are drawn already: going on"
    return f"{task}."


def _draw(job: Job, world: World, device: torch.device, slots: Slots) -> dict[str, Any]:
    """Encode and draw this rank's images; return its report."""
    cfg, shards = job.cfg, job.finished.shards
    check = Check()
    n_threads = cpu_threads() if device.type == "cpu" else 1
    n_workers = cfg.workers or max(1, rank_cores(world.local_size) // 2)
    n_images, n_pictures = len(np.unique(slots["img_i"])), 0
    began = time.perf_counter()
    progress = Progress(
        "replay", n_images * shards.n_patches, shards.d_model * 4, rank=world.rank, size=world.size, enabled=cfg.progress
    )
    drawing = draw.Drawing(
        out_dpath=job.visuals.partial_dpath,
        root=job.pictures.root if job.pictures else None,
        in_data_set=job.pictures is not None and job.pictures.names is None,
        geometry=job.geometry,
        format=cfg.image_format,
        quality=cfg.quality,
    )
    pending: deque[tuple[Image, Future[draw.Drawn]]] = deque()
    with ExitStack() as stack:
        stack.callback(progress.close)
        file = stack.enter_context(job.records.open_for(world.rank))
        precision = usable_precision(job.finished.precision, device)
        encoder = stack.enter_context(Encoder(job.finished.sae, device, precision, n_threads))
        # Not fork: torch's threads would not survive it. No processes at all where there is nothing to draw.
        pool = ProcessPoolExecutor(
            n_workers, mp_context=multiprocessing.get_context("spawn"), initializer=draw.start, initargs=(drawing,)
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)

        def finish_oldest() -> int:
            image, future = pending.popleft()
            with _drawing(world):
                drawn = future.result()
            job.records.append(file, _best(image), image.values_mp, drawn)
            progress.advance(shards.n_patches)
            return len(image.feature_m)

        for image in reencode(job.finished, slots, encoder, check, read_ahead=cfg.read_ahead, look=world.check):
            world.check()
            with _drawing(world):
                pending.append((image, pool.submit(draw.draw, _task(job, image))))
            if len(pending) > 2 * n_workers + 2:  # the bound on what waits to be drawn
                n_pictures += finish_oldest()
        while pending:
            n_pictures += finish_oldest()
    return {
        "n_images": n_images,
        "n_pictures": n_pictures,
        "n_slots": check.n_slots,
        "n_on_edge": check.n_on_edge,
        "largest": check.largest,
        "seconds": time.perf_counter() - began,
    }


@contextmanager
def _drawing(world: World) -> Iterator[None]:
    """Turn the end of a drawing process, which both handing over work and asking for its result can meet, into one line."""
    try:
        yield
    except (BrokenProcessPool, MemoryError):
        world.check()  # it may have died of a signal that asks us all to leave
        raise RunError(
            "a drawing process died or had not enough memory; lower --workers or --img-scale, then run again."
        ) from None


def _task(job: Job, image: Image) -> draw.Task:
    best = _best(image)
    return draw.Task(
        img_i=image.img_i,
        name=job.pictures.name(image.img_i) if job.pictures else "",
        features=image.feature_m.tolist(),
        places=best["place"].tolist(),
        uppers=[float(job.statistics.max_s[feature]) for feature in image.feature_m],
        values_mp=image.values_mp,
    )


def _best(image: Image) -> Slots:
    """Of each feature's slots in the image the strongest, in the order of `feature_m`."""
    return image.slots_n[np.unique(image.slots_n["feature"], return_index=True)[1]]


def _write_features(job: Job, features: list[int], check: Callable[[], None]) -> None:
    """Write data.js of each feature, out of the records of all ranks.

    Args:
        check: called before each; what it raises ends it.

    Raises:
        RunError: they are not one for each picture.
    """
    n_images = dict.fromkeys(features, 0)
    for feature, place in zip(job.slots["feature"].tolist(), job.slots["place"].tolist(), strict=True):
        if feature in n_images:
            n_images[feature] = max(n_images[feature], place + 1)
    for feature, rows in _rows(job, features, job.cfg.n_images).items():
        check()
        if [int(row["place"]) for row in rows] != list(range(n_images[feature])):
            raise RunError(
                f"{job.visuals.partial_dpath} records {len(rows)} pictures of feature {feature}; it has {n_images[feature]}. "
                "Do all ranks see this directory, and is no other replay at work in it? Run again; if it stays so, with "
                "--force."
            )
        view = gallery.FeatureView(
            feature=feature,
            upper=max(0.0, float(job.statistics.max_s[feature])),
            edges_h=job.statistics.edges_h,
            counts_h=job.statistics.counts_sh[feature],
            images=[_top_image(job, row) for row in rows],
        )
        fpath = job.visuals.partial_dpath / "features" / str(feature) / "data.js"
        with writing(fpath):
            fpath.parent.mkdir(parents=True, exist_ok=True)
            fpath.write_text(gallery.feature_js(view), encoding="utf-8")


def _rows(job: Job, features: list[int], most: int) -> dict[int, list[Any]]:
    """The records of some features' first images, at most `most` of each, out of those of all ranks; by place."""
    rows: dict[int, list[Any]] = {feature: [] for feature in features}
    for part in job.records.load():
        shown_x = np.flatnonzero(part["place"] < most)
        for i, feature in zip(shown_x.tolist(), part["feature"][shown_x].tolist(), strict=True):
            if feature in rows:
                rows[feature].append(part[i])
    for own in rows.values():
        own.sort(key=lambda row: int(row["place"]))
    return rows


def _top_image(job: Job, row: Any) -> gallery.TopImage:
    img_i = int(row["img_i"])
    picture, heatmap = draw.file_names(int(row["place"]), img_i, job.cfg.image_format)
    return gallery.TopImage(
        img_i=img_i,
        score=float(row["score"]),
        patch_i=int(row["patch_i"]),
        label=job.pictures.label(img_i) if job.pictures else "",
        path=job.pictures.name(img_i) if job.pictures else "",
        picture=picture,
        heatmap=heatmap,
        width=int(row["width"]),
        height=int(row["height"]),
        n_cols=int(row["n_cols"]),
        n_rows=int(row["n_rows"]),
        patch=float(row["patch"]),
        values_p=row["values"],
    )


def _write_page(job: Job) -> None:
    """Write what is not a feature's own: the page, the tables and the plots."""
    finished, statistics, dpath = job.finished, job.statistics, job.visuals.partial_dpath
    metrics, identity = finished.manifest.sub("metrics"), finished.manifest.sub("identity")
    facts = gallery.Facts(
        sae=f"{finished.sae.source}, {finished.sae_path}",
        shards=str(finished.shards.dpath),
        dataset=str(job.pictures.root.absolute()) if job.pictures else "",
        fit=job.geometry.describe(with_pictures=job.pictures is not None),
        family=finished.shards.family,
        ckpt=finished.shards.ckpt,
        layer=finished.shards.layer,
        n_imgs=finished.shards.n_examples,
        n_left_out=finished.n_left_out,
        n_patches=finished.shards.n_patches,
        n_tokens=metrics.get("n_tokens", int),
        d_sae=finished.sae.d_sae,
        l0=metrics.get("l0", float),
        n_dead=metrics.count("n_dead", most=finished.sae.d_sae),
        normalized_mse=metrics.obj.get("normalized_mse"),
        rank_by=identity.get("rank_by", str),
        top_k=identity.get("top_k", int),
        percentile=statistics.percentile,
        precision=finished.precision,
        version=__version__,
        features=tuple(sorted(set(job.cfg.features))),
        flags=tuple(flags_of(job.cfg, without={"run", "features", *INERT})),
    )
    (dpath / "index.html").write_text(gallery.index_html(facts), encoding="utf-8")
    (dpath / "data.js").write_text(gallery.data_js(facts, statistics, _cards(job)), encoding="utf-8")
    with open(dpath / "features.parquet", "wb") as file:
        tables.write_features_parquet(file, statistics, finished.imgs_sk)
    with open(dpath / "features.csv", "wb") as file:
        tables.write_features_csv(file, statistics, finished.imgs_sk)
    if job.pictures:
        with open(dpath / "images.parquet", "wb") as file:
            tables.write_images_parquet(file, job.pictures.rows())
    (dpath / "density.png").write_bytes(plots.density_png(statistics.log10_freq_s, statistics.log10_mean_s))
    (dpath / "distributions.png").write_bytes(plots.distributions_png(finished.distributions()))


def _cards(job: Job) -> list[gallery.Card]:
    """What the grid shows of each chosen feature."""
    return [
        gallery.card(feature, [_top_image(job, row) for row in own], close_ups=job.pictures is not None)
        for feature, own in _rows(job, job.features, gallery.CARD_IMAGES).items()
    ]


def _summary(job: Job, reports: list[dict[str, Any]]) -> str:
    total = {key: sum(report[key] for report in reports) for key in ("n_images", "n_pictures", "n_slots", "n_on_edge")}
    seconds = max(report["seconds"] for report in reports)
    n_fired = sum(math.isfinite(job.statistics.log10_freq_s[feature]) for feature in job.features)
    lines = {
        "features": f"{len(job.features):,} shown, {n_fired:,} of them fired, of {job.finished.sae.d_sae:,}",
        "images": f"{describe_encoded(job.slots, total['n_images'])} in {seconds:,.1f} s",
        "verified": f"{total['n_slots']:,} scores equal the stored ones, {total['n_on_edge']} on the edge of their token",
        "drawn": f"{total['n_pictures']:,} heatmaps, {total['n_pictures'] / max(seconds, 1e-9):,.0f} per second",
        "pictures": _ground(job),
        "fit": job.geometry.describe(with_pictures=job.pictures is not None),
        "gallery": f"{job.visuals.dpath / 'index.html'}: open it in a browser",
    }
    if job.finished.n_left_out:
        lines["left out"] = f"{job.finished.n_left_out:,} images of bad shards"
    return table(lines)


def _ground(job: Job) -> str:
    """What heatmaps are drawn on."""
    if job.pictures:
        return f"{job.pictures.root} ({job.pictures.kind}), matched by order"
    return f"none{' found (name them with --images)' if job.cfg.pictures else ''}: heatmaps on a plain ground"
