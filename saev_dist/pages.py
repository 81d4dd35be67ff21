"""What a replay writes beside its pictures: each feature's data.js out of the records, and what all features share."""

from collections.abc import Callable
from typing import Any

import numpy as np

from saev_dist import __version__, draw
from saev_dist.errors import RunError
from saev_dist.files import writing
from saev_dist.render import gallery, plots, tables
from saev_dist.replay_job import Job
from saev_dist.report import flags_of

INERT = {"config", "device", "workers", "read_ahead", "timeout_s", "dry_run", "force", "progress"}
"""Fields of the config that change nothing that is drawn."""


def write_features(job: Job, features: list[int], check: Callable[[], None]) -> None:
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


def write_page(job: Job) -> None:
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
