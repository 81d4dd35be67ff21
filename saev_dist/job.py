"""What a run works on: the config, with everything that it names opened and checked."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from saev_dist.config import Extract, SaeRules
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError
from saev_dist.plan import Plan
from saev_dist.sae.encoder import batch_threads
from saev_dist.sae.hub import absolute
from saev_dist.sae.load import Loaded, Overrides, load_sae
from saev_dist.sae.model import Sae
from saev_dist.selfcheck import Report
from saev_dist.statistics import state_names
from saev_dist.world import World

# Fields of the config that change no byte of any artifact, or that stand in the identity in another form.
INERT = {
    "shards",
    "sae",
    "out",
    "config",
    "layer",
    "device",
    "read_ahead",
    "timeout_s",
    "snapshot_every",
    "skip_bad_shards",
    "dry_run",
    "force",
    "self_check",
    "progress",
} | {field.name for field in fields(SaeRules)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run works on: the config with everything that it names opened and checked."""

    cfg: Extract
    shards: Shards
    loaded: Loaded
    overrides: Overrides
    plan: Plan
    device: torch.device
    n_threads: int
    """That encode side by side."""
    identity: dict[str, Any]
    """What the bytes of the artifacts depend on; JSON."""
    self_check: Report | None = None

    @property
    def sae(self) -> Sae:
        return self.loaded.sae


def open_job(cfg: Extract, world: World) -> Job:
    """Open and check what the config names."""
    shards = Shards.open(cfg.shards, cfg.layer)
    overrides = Overrides.of(cfg)
    loaded = load_sae(cfg.sae, overrides)
    sae = loaded.sae
    loaded.check_width(shards)
    if cfg.metrics and not sae.reconstructs:
        raise ConfigError(
            f"--metrics measures how well an SAE gives its input back; {cfg.sae} ({sae.source}) predicts another one."
        )
    device = world.device(cfg.device)
    if cfg.percentile_estimator == "saev" and world.size > 1:
        raise ConfigError(
            f"--percentile-estimator saev depends on the order of all tokens, so it runs in one process; "
            f"there are {world.size}. Use the histogram, which merges."
        )
    settings = {name: value for name, value in asdict(cfg).items() if name not in INERT}
    identity = settings | loaded.identity()
    identity |= {
        "layer": shards.layer,
        "device": device.type,
        "shards_sha256": shards.fingerprint(),
        "shards_probes": shards.probes(skip_bad=cfg.skip_bad_shards),
        "statistics": state_names(cfg, sae, shards),
    }
    plan = Plan(shards.examples, max(1, cfg.batch_tokens // shards.n_patches))
    return Job(
        cfg=cfg,
        shards=shards,
        loaded=loaded,
        overrides=overrides,
        plan=plan,
        device=device,
        n_threads=batch_threads(device),
        identity=identity,
    )


def as_json(cfg: Extract) -> dict[str, Any]:
    """All settings; paths absolute, so that they mean the same from elsewhere."""
    return {name: str(absolute(value)) if isinstance(value, Path) else value for name, value in asdict(cfg).items()}
