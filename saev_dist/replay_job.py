"""What a replay works on: the run and the pictures that its config names, opened and checked, and what is to be drawn."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saev_dist import __version__
from saev_dist.choose import Slots, choose_features, choose_slots
from saev_dist.config import Replay
from saev_dist.data.images import Pictures, open_pictures
from saev_dist.finished import FinishedRun, Statistics
from saev_dist.records import Records
from saev_dist.render.geometry import Geometry, default_fit
from saev_dist.store import Run
from saev_dist.visuals import Visuals


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
        return Records(self.visuals.partial_dpath, self.finished.shards.n_patches, self.cfg.image_format, self.pictures)


def open_job(cfg: Replay) -> Job:
    """Open and check what the config names, and choose."""
    manifest_sha256 = Run(cfg.run).manifest_sha256()
    finished = FinishedRun.open(cfg.run, shards=cfg.shards, sae=cfg.sae)
    finished.check_slots()
    shards = finished.shards
    statistics = finished.statistics()
    features = choose_features(
        statistics,
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
