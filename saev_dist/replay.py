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

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from saev_dist import draw
from saev_dist.choose import Slots, deal
from saev_dist.config import Replay
from saev_dist.errors import RunError
from saev_dist.files import writing
from saev_dist.lock import Lock
from saev_dist.machine import rank_cores
from saev_dist.pages import write_features, write_page
from saev_dist.progress import Progress
from saev_dist.reencode import Check, Image, encoder_of, reencode
from saev_dist.render.plots import plasma
from saev_dist.replay_job import Job, open_job
from saev_dist.replay_report import already_done, announce, describe_plan, describe_task, summary
from saev_dist.store import Run
from saev_dist.world import World


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
        advice = "All ranks must see the same run and pictures; name a folder that they share."
        world.agree(job.identity, would="draw another gallery", advice=advice)
        if world.tell(world.rank == 0 and _is_done(job)):
            if world.rank == 0:
                with suppress(RunError), Lock(cfg.run).hold():  # unless another replay is at work
                    job.visuals.tidy()
                print(already_done(job))
            return
        if cfg.dry_run:
            if world.rank == 0:
                announce(job)
                print(describe_plan(job))
            return
        # Two replays in one directory would mix their pictures, and an `extract --force` would change what is drawn.
        if world.rank == 0:
            held.enter_context(Lock(cfg.run).hold(patience_s=world.patience_s, check=world.check))
            if Run(cfg.run).manifest_sha256() != job.identity["manifest_sha256"]:
                raise RunError(f"{cfg.run} has changed: another process computed it again. Run again.")
            job.visuals.bring_back()
        if world.tell(world.rank == 0 and _is_done(job)):  # since, by another process
            if world.rank == 0:
                print(already_done(job))
            return
        if world.rank == 0:
            job.visuals.begin(afresh=cfg.force and not world.restarted)
            announce(job)
        world.wait()
        for fpath in job.records.fpaths()[world.rank :: world.size]:
            job.records.keep_sound(fpath)
        world.wait()
        todo = job.records.missing(job.slots)
        if world.rank == 0:
            print(describe_task(job, todo), flush=True)
        world.wait()  # nobody appends before all have read
        report = _draw(job, world, device, deal(todo, world.size)[world.rank])
        reports = world.collect(report)
        write_features(job, job.features[world.rank :: world.size], world.check)
        world.wait()
        if world.local_rank == 0 and world.rank:  # rank 0 has the page to add
            job.visuals.sync()
        world.wait()
        if world.rank == 0:
            with writing(job.visuals.partial_dpath):
                write_page(job)
            job.visuals.sync()
            world.check()
            job.visuals.publish()
        world.finish()
        if world.rank == 0:
            print(summary(job, reports))


def _is_done(job: Job) -> bool:
    return not job.cfg.force and job.visuals.is_done()


def _draw(job: Job, world: World, device: torch.device, slots: Slots) -> dict[str, Any]:
    """Encode and draw this rank's images; return its report."""
    cfg, shards = job.cfg, job.finished.shards
    check = Check()
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
        colours_c3=plasma(),
        format=cfg.image_format,
        quality=cfg.quality,
    )
    pending: deque[tuple[Image, Future[draw.Drawn]]] = deque()
    with ExitStack() as stack:
        stack.callback(progress.close)
        file = stack.enter_context(job.records.open_for(world.rank))
        encoder = stack.enter_context(encoder_of(job.finished, device))
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
