"""Which statistics a run keeps. To add one see CONTRIBUTING.md."""

import torch

from saev_dist.accumulators.base import Accumulator
from saev_dist.accumulators.bundle import Bundle
from saev_dist.accumulators.histogram import Histogram
from saev_dist.accumulators.moments import Moments
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.accumulators.saev_percentile import SaevPercentile
from saev_dist.accumulators.topk import TopK
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.sae.model import Sae


def make_bundle(cfg: Extract, sae: Sae, shards: Shards) -> Bundle:
    """The empty state of all of a run's accumulators."""
    of_saev = cfg.percentile_estimator == "saev"
    bundle = Bundle(
        {
            "topk": TopK(sae.d_sae, cfg.top_k, shards.n_patches, cfg.rank_by),
            "moments": Moments(sae.d_sae),
            "histogram": Histogram(sae.d_sae, None if of_saev else cfg.percentile),
        }
    )
    if of_saev:
        bundle.parts["saev_percentile"] = SaevPercentile(sae.d_sae, cfg.percentile, shards.n_tokens)
    if cfg.metrics:
        bundle.parts["reconstruction"] = Reconstruction(*sae.decoder(), sae.undo_norm())
    return bundle


def _without_memory(cfg: Extract, sae: Sae, shards: Shards) -> Bundle:
    """The same on torch's meta device: tensors of the same names, shapes and types, for which there need be no room."""
    with torch.device("meta"):
        return make_bundle(cfg, sae, shards)


def state_names(cfg: Extract, sae: Sae, shards: Shards) -> list[str]:
    """Of the state's tensors: what a partial of this version holds."""
    return sorted(_without_memory(cfg, sae, shards).state_dict())


def state_bytes(cfg: Extract, sae: Sae, shards: Shards) -> int:
    """That the state takes, in memory and in a partial."""
    return sum(tensor.nbytes for tensor in _without_memory(cfg, sae, shards).state_dict().values())


def brings_codes_to_the_cpu(cfg: Extract, sae: Sae, shards: Shards) -> bool:
    """Whether some statistic looks at a GPU's codes on the CPU."""
    parts = _without_memory(cfg, sae, shards).parts.values()
    return any(type(part).update_on_device is Accumulator.update_on_device for part in parts)
