"""Fold the partials of a run into its artifacts, in one process: for a run that died after its last batch."""

from dataclasses import replace

from saev_dist.config import Extract, Merge, from_json
from saev_dist.errors import ConfigError, RunError
from saev_dist.extract import work
from saev_dist.job import open_job
from saev_dist.selfcheck import Report
from saev_dist.store import Run
from saev_dist.world import World


def run(cfg: Merge) -> None:
    """Write the artifacts if all batches are done.

    Raises:
        RunError: nothing is under way there, batches are missing, or the inputs are not those that the run began with.
    """
    with World(timeout_s=600) as world, world.obeying_signals(cfg.run / "partials"):
        store = Run(cfg.run)
        under_way = store.under_way()
        if under_way is None:
            store.refuse_orphans()
            state = "is finished" if store.manifest() is not None else "is not a run"
            raise RunError(f"{cfg.run} {state}: there are no partials to merge.")
        try:
            made_with = from_json(Extract, under_way.get("config", dict))
        except ConfigError as err:
            raise RunError(f"{store.partials_dpath / 'run.json'}: {err} Use the version that began the run.") from None
        shards, sae = cfg.shards or made_with.shards, cfg.sae or made_with.sae
        job = open_job(replace(made_with, shards=shards, sae=sae, out=cfg.run, device="cpu"), world)
        # Nothing is encoded here, so the device is that of the run.
        identity = job.identity | {"device": under_way.get("identity", dict).get("device")}
        job = replace(job, identity=identity, cfg=replace(job.cfg, device=made_with.device))
        store.refuse_others(job.identity, force=False)
        report = Report.from_json(under_way.obj.get("self_check"))
        job = replace(job, identity=under_way.get("identity", dict), self_check=report)
        with store.lock.hold():
            if store.under_way() is None:
                raise RunError(f"{cfg.run} has just been finished by another process: there are no partials to merge.")
            work(job, store, world, encode=False)
