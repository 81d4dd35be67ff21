"""`saev-dist verify`: encode the tokens that won again, and compare every stored score of a sample of features."""

import numpy as np

from saev_dist.choose import choose_features, choose_slots, deal
from saev_dist.config import Verify
from saev_dist.finished import FinishedRun
from saev_dist.output import table
from saev_dist.progress import Progress
from saev_dist.reencode import TOLERANCE, Check, encoder_of, verify_tokens
from saev_dist.report import describe_edge, describe_left_out
from saev_dist.world import World

NOTHING = "nothing to verify: none of these features ever fired"


def run(cfg: Verify) -> None:
    """Compare, and print a table.

    Raises:
        RunError: a stored score is not what the SAE gives, or `cfg.run` is no finished run.
    """
    with World(cfg.timeout_s) as world:
        finished = FinishedRun.open(cfg.run, shards=cfg.shards, sae=cfg.sae)
        device = world.device(cfg.device)
        features = choose_features(
            finished.statistics(), always=cfg.features, n_features=cfg.n_features, every=cfg.all, seed=cfg.seed
        )
        slots = choose_slots(features, finished.values_sk, finished.imgs_sk, finished.patches_sk, n_images=None)
        own = deal(slots, world.size)[world.rank]
        check = Check()
        n_images = len(np.unique(own["img_i"]))
        n_patches = finished.shards.n_patches
        progress = Progress(
            "verify", n_images * n_patches, finished.shards.d_model * 4, rank=world.rank, size=world.size, enabled=cfg.progress
        )
        with encoder_of(finished, device) as encoder:
            for _ in verify_tokens(finished, own, encoder, check, read_ahead=cfg.read_ahead, look=world.check):
                world.check()
                progress.advance(n_patches)
        progress.close()
        finished.check_slots()  # after the scores: of a wrong one its own line says more
        reports = world.collect([check.n_slots, check.n_on_edge, check.largest])
        if world.rank == 0:
            n_slots, on_edge, largest = zip(*reports, strict=True)
            n_fired = int((finished.values_sk[:, 0] > 0).sum())
            print(
                table(
                    {
                        "run": str(cfg.run),
                        "features": f"{len(features):,} of {finished.sae.d_sae:,}",
                        "encoded again": f"{len(np.unique(slots[['img_i', 'patch_i']])):,} tokens of "
                        f"{len(np.unique(slots['img_i'])):,} images",
                        "scores": f"{sum(n_slots) - sum(on_edge):,} equal to the stored ones{describe_edge(sum(on_edge))}",
                        "largest difference": f"{max(largest):.1%} of the tolerance for {finished.precision} "
                        f"(2^{np.log2(TOLERANCE[finished.precision]):.0f} of the sum of a score's terms)",
                        "verdict": ("verified: these slots are what the SAE gives" if len(slots) else NOTHING)
                        + ("" if len(features) >= n_fired else " (--all checks those of every feature)"),
                    }
                    | ({"left out": describe_left_out(finished.manifest)} if finished.n_left_out else {})
                )
            )
        world.wait()
