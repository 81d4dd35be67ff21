"""What a job tells people: its plan, its result, what is kept, and the flags that make it."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from saev_dist import partials
from saev_dist.errors import DamagedError, RunError, count
from saev_dist.estimate import Estimate
from saev_dist.fields import Fields
from saev_dist.files import free_disk
from saev_dist.job import Job
from saev_dist.output import gb, table
from saev_dist.plan import complement
from saev_dist.sae.hub import absolute
from saev_dist.store import Run


def flags_of(cfg: Any, *, without: Collection[str]) -> list[str]:
    """The flags that make a config what it is: those of its fields that differ from their defaults, paths absolute."""
    flags: list[str] = []
    for field in fields(cfg):
        value, flag = getattr(cfg, field.name), field.name.replace("_", "-")
        if field.name in without or value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else [absolute(value) if isinstance(value, Path) else value]
            flags += [f"--{flag}", *map(str, values)]
    return flags


def summary(out_dpath: Path, manifest: dict[str, Any]) -> str:
    """What a finished run prints."""
    metrics, ranks, wall_s = manifest["metrics"], manifest["ranks"], manifest["wall_s"]
    n_dead, d_sae = metrics["n_dead"], metrics["d_sae"]
    n_tokens, n_before = (sum(rank[key] for rank in ranks) for key in ("n_tokens", "n_tokens_before"))
    rate = n_tokens / max(wall_s["stream"], 1e-9)
    n_bytes = rate * manifest["shards"]["d_model"] * 4
    lines = {
        "tokens": f"{metrics['n_tokens']:,} of {metrics['n_tokens'] // manifest['shards']['n_patches']:,} images",
        "L0": f"{metrics['l0']:.1f} of {d_sae:,} features above zero per token",
        "dead features": f"{n_dead:,} ({n_dead / d_sae:.1%})",
        **({} if metrics.get("normalized_mse") is None else {"normalized MSE": f"{metrics['normalized_mse']:.4f}"}),
        "throughput": f"{rate:,.0f} tokens/s, {gb(n_bytes)}/s read, {count(len(ranks), 'rank')}",
        "wall time": ", ".join(f"{stage} {value:,.1f} s" for stage, value in wall_s.items()),
        "artifacts": str(out_dpath),
    }
    if n_before:
        lines["throughput"] += f"; {n_before:,} tokens were done before"
    if left_out := describe_left_out(Fields(manifest, "manifest.json", RunError)):
        lines["left out"] = left_out
    return table(lines)


def already_done(store: Run) -> str:
    """What a command prints whose run is finished already."""
    manifest = store.manifest()
    if manifest and (left_out := describe_left_out(manifest)):
        return (
            f"{store.dpath} holds this run, finished without {left_out}. Where they can be read now, --force computes it again."
        )
    return f"{store.dpath} holds this run, finished: nothing to do. (--force computes it again.)"


def describe_left_out(manifest: Fields) -> str:
    """What `--skip-bad-shards` left out; "" where it left out nothing."""
    parts = [Fields(part, f"{manifest.where}, left_out", RunError) for part in manifest.get("left_out", list, [])]
    shards = sorted({part.get("shard", str) for part in parts})
    listed = ", ".join(shards[:10]) + (f" and {len(shards) - 10:,} more (see manifest.json)" if len(shards) > 10 else "")
    n_images = sum(part.get("n_images", int) for part in parts)
    return f"{count(n_images, 'image')} of {count(len(shards), 'bad shard')}: {listed}" if parts else ""


def describe_kept(store: Run) -> str:
    """How much of the run that is under way is done and on the disk; "" where none is."""
    if (under_way := store.under_way()) is None:
        return ""
    try:
        kept = partials.newest(store.partials_dpath)
    except DamagedError as err:  # the next attempt sets it aside
        return f"unknown: {str(err).split(';')[0]}. The same extract goes on without that one"
    n_kept = sum(partial.n_batches for partial in kept)
    n_batches = under_way.positive("n_batches")
    if not kept:
        return f"nothing yet of {n_batches:,} batches"
    return f"{n_kept:,} of {n_batches:,} batches ({n_kept / n_batches:.1%}), in {count(len(kept), 'partial')}"


def describe_edge(n_on_edge: int) -> str:
    """What to add to the number of scores that are equal."""
    return f", {n_on_edge:,} more are on the edge: rounding alone keeps them in or out" if n_on_edge else ""


def describe_plan(job: Job, need: Estimate, n_ranks: int) -> str:
    """What --dry-run prints."""
    cfg, shards, sae, plan = job.cfg, job.shards, job.sae, job.plan
    shares = [sum(stop - first for first, stop in share) for share in plan.deal(complement((), plan.n_batches), n_ranks)]
    batch_tokens = plan.largest_batch * shards.n_patches
    lines = {
        "tokens": f"{shards.n_tokens:,}: {shards.n_examples:,} images × {shards.n_patches:,} patches, layer {shards.layer}",
        "to read": f"{gb(shards.n_examples * shards.content_bytes)} from {count(len(shards.names), 'shard')}",
        "SAE": f"{sae.source}; {sae.d_model:,} -> {sae.d_sae:,}",
        "batches": f"{plan.n_batches:,} of up to {plan.largest_batch:,} images ({batch_tokens:,} tokens)",
        "per rank": f"{_span(min(shares), max(shares))} batches on {count(n_ranks, 'rank')}",
        "host memory": f"{gb(need.host_total)} per rank, {count(need.n_threads, 'thread')}: "
        + ", ".join(f"{k} {gb(v)}" for k, v in need.host.items()),
        "device": ", ".join(f"{k} {gb(v)}" for k, v in need.device.items()) or "none: the encoder runs on the CPU",
        "snapshots": f"{gb(need.partial)} per rank, every {cfg.snapshot_every:g} s; twice that while one replaces another",
        **({"kept": kept} if not cfg.force and (kept := describe_kept(Run(cfg.out))) else {}),
        "disk": gb(need.artifacts)
        + (f", and img_acts.npz up to about {gb(need.img_acts)}, twice that while it is put together" if cfg.img_acts else "")
        + f"; {gb(free_disk(cfg.out))} free",
    }
    return table(lines) + "\ndry run: nothing was computed or written."


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
