"""`python -m slurm.launch [launcher flags] COMMAND [flags]`: see `config.Launcher` for what it does.

Importing this loads neither torch nor NumPy: submitting takes a fraction of a second.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

import tyro

from saev_dist.cli import with_toml
from saev_dist.config import Extract, Replay
from saev_dist.data.images import open_pictures
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError, Preempted, RunError, SaevDistError, count, of_file, tell, warn
from saev_dist.files import writing
from saev_dist.output import gb, printing
from saev_dist.sae.hub import is_hub_name
from slurm.config import Cancel, Launcher, Status
from slurm.jobs import Job, cancelled_fpath, latest, remember, tail, warnings
from slurm.progress import describe
from slurm.queue import ask, call, is_elsewhere
from slurm.submit import run_here, sbatch_text, submit, tell_to_leave
from slurm.sweep import configs, is_finished, run_dpath
from slurm.watch import describe_state, follow, verdict

COMMANDS = ("extract", "replay", "pipeline", "status", "cancel")
SWITCHES = ("--wait", "--no-wait", "--dry-run", "--no-dry-run")
PROG = "python -m slurm.launch"


def main(argv: list[str] | None = None) -> None:
    """Parse, launch, and exit: 0 submitted (with --wait: done), 1 an error or a failed job, 2 wrong usage."""
    try:
        with printing():
            well = run(sys.argv[1:] if argv is None else argv)
        sys.exit(0 if well else 1)
    except (SaevDistError, OSError) as err:
        print(f"slurm.launch: error: {of_file(err) if isinstance(err, OSError) else err}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            "slurm.launch: no longer waiting. A job on Slurm goes on (status, cancel); one on this machine leaves and keeps "
            "what is done, and the same command continues it.",
            file=sys.stderr,
        )
        sys.exit(130)


def run(argv: list[str]) -> bool:
    """Do what the arguments say; False if a job that was waited for failed."""
    flags, command, rest = split(argv)
    _refuse_misplaced(command, rest)
    launcher = tyro.cli(Launcher, prog=PROG, args=with_toml(flags, Launcher))
    match command:
        case "extract":
            return launch(launcher, configs(Extract, rest), [])
        case "replay":
            return launch(launcher, [], configs(Replay, rest))
        case "pipeline":
            if {"-h", "--help"} & set(rest):
                print(f"{PROG} pipeline FLAGS [-- FLAGS]: extract with the first ones, then replay with those behind the --.")
            at = rest.index("--") if "--" in rest else len(rest)
            extracts = configs(Extract, rest[:at])
            (pattern,) = configs(Replay, [*rest[at + 1 :], "--run", str(extracts[0].out)])
            return launch(launcher, extracts, [replace(pattern, run=cfg.out) for cfg in extracts])
        case "status":
            return status(tyro.cli(Status, prog=f"{PROG} status", args=with_toml(rest, Status)))
        case "cancel":
            return cancel(tyro.cli(Cancel, prog=f"{PROG} cancel", args=with_toml(rest, Cancel)))
    raise AssertionError("without a command there was --help, which has been given")


def split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """The launcher's flags, the command, and its flags. A command's word may also be a flag's value."""
    for i, word in enumerate(argv):
        former = argv[i - 1] if i else ""
        is_value = former.startswith("--") and "=" not in former and former.replace("_", "-") not in SWITCHES
        if word in COMMANDS and not is_value:
            return argv[:i], word, argv[i + 1 :]
    if not {"-h", "--help"} & set(argv):
        meant = [(word, near) for word in argv for near in get_close_matches(word, COMMANDS, 1, cutoff=0.75)]
        told = f"a command is missing: one of {', '.join(COMMANDS)}; --help explains."
        if meant:
            told = f"{meant[0][0]!r} is no command: did you mean {meant[0][1]!r}?"
        print(f"{PROG}: {told}", file=sys.stderr)
        sys.exit(2)
    return argv, "", []


def _refuse_misplaced(command: str, rest: Sequence[str]) -> None:
    """Wrong usage: a flag of the launcher's among those of the job, or of a pipeline's replay among those of its extract."""
    if command not in ("extract", "replay", "pipeline"):
        return
    extract, replay, launcher = ({field.name for field in fields(kind)} for kind in (Extract, Replay, Launcher))
    at = rest.index("--") if "--" in rest else len(rest)
    of_replay = "a flag of replay: write it at the end, behind a --"
    of_none = "not for a pipeline, whose replay draws what its extract writes: leave it out"
    refused = [(rest, launcher - extract - replay, f"a flag of the launcher: write it before {command!r}")]
    if command == "pipeline":
        refused += [
            (rest[:at], replay - extract - {"run"}, of_replay),
            (rest[at:], {"run", "run_dir"}, of_none),
        ]
    for words, names, told in refused:
        known = "|".join(name.replace("_", "[-_]") for name in names)
        if found := [word for word in words if re.fullmatch(f"--(no[-_])?({known})(=.*)?", word, re.S)]:
            print(f"{PROG}: {found[0]} is {told}.", file=sys.stderr)
            sys.exit(2)


def launch(launcher: Launcher, extracts: Sequence[Extract], replays: Sequence[Replay]) -> bool:
    """Submit what is not finished: extracts, and replays after those of the same run."""
    finished = [cfg for cfg in extracts if is_finished(cfg)]
    for cfg in finished:
        print(f"{cfg.out} is finished: no extract.")
    todo = [cfg for cfg in extracts if cfg not in finished]
    to_wait_for = {cfg.out for cfg in todo}
    at_once = [cfg for cfg in replays if cfg.run not in to_wait_for]
    later = [cfg for cfg in replays if cfg.run in to_wait_for]
    on_cpus = bool(todo or at_once) and launcher.cluster != "debug" and not launcher.gpus_per_node
    if on_cpus and launcher.n_threads != launcher.cpus_per_gpu:
        warn(
            f"OMP_NUM_THREADS={launcher.n_threads}, of this shell or of --setup, will hold in the job, and --cpus-per-gpu "
            f"{launcher.cpus_per_gpu} only reserve cores. Unset it unless you mean that."
        )
    if launcher.of_no_effect:
        warn(f"--cluster {launcher.cluster} takes no notice of {', '.join(launcher.of_no_effect)}.")
    # A flag of extract or replay cannot mean a job that only plans.
    if launcher.dry_run or any(cfg.dry_run for cfg in extracts) or any(cfg.dry_run for cfg in replays):
        return show_plan(launcher, todo, at_once, later)
    _check_inputs([*todo, *at_once], later)
    for batch in (todo, at_once):
        _check_free(batch)
    if launcher.cluster != "slurm":
        return _run_one_by_one(launcher, [*at_once, *todo], later)
    jobs: list[Job] = []
    if at_once:
        jobs += _submitted(launcher, at_once)
    if todo:
        first = _submitted(launcher, todo)
        jobs += first
        if later:
            # Each of an array's jobs waits for its counterpart.
            array_id = first[0].job_id.split("_")[0]
            jobs += _submitted(launcher, later, f"{'aftercorr' if len(first) > 1 else 'afterok'}:{array_id}")
    return follow(jobs) if launcher.wait else True


def _submitted(launcher: Launcher, cfgs: Sequence[Extract | Replay], dependency: str = "") -> list[Job]:
    logs = _logs_dpath(launcher, cfgs)
    with _undone_if_refused(logs, *(run_dpath(cfg) / "slurm" for cfg in cfgs)):
        jobs = submit(launcher, cfgs, logs, dependency)
    for job in jobs:
        print(f"{job.kind} {job.job_id}  {job.run}  logs in {job.folder}", flush=True)
        try:
            remember(job)
        except RunError as err:  # the job is there; `status` and `cancel` will not find it
            warn(f"{job.kind} {job.job_id} could not be noted: {err}")
    return jobs


@contextmanager
def _undone_if_refused(logs: Path, *others: Path) -> Iterator[None]:
    """Make directories, before there is a job that nobody could note; where none comes to be, what was made goes."""
    made: list[Path] = []
    try:
        for dpath in (logs, *others):
            with writing(dpath):
                made += [path for path in (*reversed(dpath.parents), dpath) if not path.exists() and path not in made]
                dpath.mkdir(parents=True, exist_ok=True)
        before = _submissions(logs)
        yield
    except SaevDistError:
        with suppress(OSError):
            for fpath in _submissions(logs) - before:
                fpath.unlink()
        with suppress(OSError):
            for dpath in sorted(made, reverse=True):
                dpath.rmdir()
        raise


def _submissions(logs: Path) -> set[Path]:
    """What submitit writes before there is a job, whose number these files then get."""
    return {
        fpath for fpath in logs.iterdir() if re.fullmatch(r"([0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh)", fpath.name)
    }


def _run_one_by_one(launcher: Launcher, first: Sequence[Extract | Replay], later: Sequence[Replay]) -> bool:
    """On this machine: each job to its end, and a replay after its extract if that succeeded."""
    all_well = True
    after = {cfg.run: cfg for cfg in later}
    for cfg in first:
        well = True
        for part in (cfg, after.get(run_dpath(cfg))):
            if part is None or not well:
                continue
            well = (_run_here if launcher.cluster == "debug" else _launch_here)(launcher, part)
        all_well &= well
    return all_well


def _run_here(launcher: Launcher, cfg: Extract | Replay) -> bool:
    try:
        run_here(cfg, _logs_dpath(launcher, [cfg]))
    except Preempted:
        raise
    except SaevDistError as err:  # of this run of a sweep
        tell(f"slurm.launch: error: {err}")
        return False
    return True


def _launch_here(launcher: Launcher, cfg: Extract | Replay) -> bool:
    """Submit a job to this machine and follow it. An interrupt tells it to leave; a second one no longer waits for that."""
    jobs: list[Job] = []
    try:
        jobs = _submitted(launcher, [cfg])
        return follow(jobs)
    except KeyboardInterrupt:
        for job in jobs:
            tell_to_leave(job)
            print(f"slurm.launch: {job.kind} {job.job_id} has been told to keep what is done and leave.", file=sys.stderr)
        follow(jobs)
        raise


def _logs_dpath(launcher: Launcher, cfgs: Sequence[Extract | Replay]) -> Path:
    """Where the folders of these jobs go: beside the runs where there are several."""
    dpath = launcher.logs
    if dpath is None:
        runs = [run_dpath(cfg) for cfg in cfgs]
        dpath = (runs[0] if len(runs) == 1 else runs[0].parent) / "slurm"
    # Slurm puts something in place of a %, a backslash keeps it from doing so where it is meant to, a newline ends a line.
    if bad := set("%\\\n") & set(str(dpath)):
        raise ConfigError(f"{dpath}: Slurm takes no {min(bad)!r} in the name of a log; choose other --logs.")
    return dpath.absolute()


def _check_inputs(cfgs: Sequence[Extract | Replay], later: Sequence[Replay]) -> None:
    """Refuse names of nothing, a layer that is not in the shards, and another number of pictures than of images, before they
    wait in a queue. Into an SAE and the shards' files the job looks. The runs of later replays are not there yet."""
    opened: dict[tuple[Path, int | None], Shards] = {}
    for cfg in [*cfgs, *later]:
        if isinstance(cfg, Replay):
            needed = [] if cfg in later else [cfg.run]
            needed += [cfg.images] if cfg.images else []
        else:
            needed = [cfg.shards / "metadata.json"]
        if isinstance(cfg, Extract) and not is_hub_name(cfg.sae):
            needed.append(cfg.sae)
        if missing := [path for path in needed if not os.path.exists(path)]:
            raise ConfigError(f"{missing[0]} is not there, so nothing was launched. Jobs see what this machine sees.")
        if isinstance(cfg, Extract) and (cfg.shards, cfg.layer) not in opened:  # a sweep has many SAEs
            opened[cfg.shards, cfg.layer] = Shards.open(cfg.shards, cfg.layer)
    n_imgs = {cfg.out: opened[cfg.shards, cfg.layer].n_examples for cfg in cfgs if isinstance(cfg, Extract)}
    for images, n in {(cfg.images, n_imgs[cfg.run]) for cfg in later if cfg.images}:
        open_pictures(images, n)


def _check_free(cfgs: Sequence[Extract | Replay]) -> None:
    """Refuse a run directory on which an earlier job still works."""
    former = [job for cfg in cfgs for job in latest(run_dpath(cfg))]
    states = ask(former)
    for job in former:
        if states[job.job_id].is_under_way and states[job.job_id].name != "UNKNOWN":
            raise ConfigError(
                f"{job.run}: {job.kind} {job.job_id} works on it ({describe_state(states[job.job_id])}). "
                f"Wait for it, or end it: {PROG} cancel --run {job.run}"
            )


def show_plan(launcher: Launcher, todo: Sequence[Extract], at_once: Sequence[Replay], later: Sequence[Replay]) -> bool:
    """Print what would be submitted."""
    for extract in todo:
        print(f"{extract.out}\n{plan_text(extract, launcher)}", end="\n\n")
    if at_once:
        from saev_dist.replay_job import open_job
        from saev_dist.replay_report import describe_plan

        for replay in at_once:
            print(f"{replay.run}\n{describe_plan(open_job(replay))}", end="\n\n")
    for images in {replay.images for replay in later if replay.images and not replay.images.is_dir()}:
        warn(f"--images {images} is no folder here, so without --dry-run nothing would be launched.")
    after = "aftercorr:EXTRACT" if len(later) > 1 else "afterok:EXTRACT"
    groups: list[tuple[Sequence[Extract | Replay], str]] = [(at_once, ""), (todo, ""), (later, after)]
    for cfgs, dependency in groups:
        if not cfgs:
            continue
        kind = type(cfgs[0]).__name__.lower()
        ranks = f"{count(launcher.nodes, 'node')} × {count(launcher.ranks_per_node, 'rank')}"
        print(f"{kind}: {count(len(cfgs), 'job')} of {ranks if launcher.cluster != 'debug' else 'one rank, in this process'}")
        for cfg in cfgs:
            print(f"  {run_dpath(cfg)}")
        if launcher.cluster == "slurm":
            print(sbatch_text(launcher, kind, len(cfgs), _logs_dpath(launcher, cfgs), dependency))
    print("dry run: nothing was submitted.")
    return True


def plan_text(cfg: Extract, launcher: Launcher) -> str:
    """What `saev-dist extract --dry-run` would print on the cluster; this machine need have no GPU."""
    import torch

    from saev_dist.estimate import within
    from saev_dist.job import open_job
    from saev_dist.report import describe_plan
    from saev_dist.sae.encoder import batch_threads
    from saev_dist.world import World

    world = World(cfg.timeout_s)
    world.size = launcher.n_ranks
    job = open_job(replace(cfg, device="cpu"), world)
    on_gpu = cfg.device != "cpu" and bool(launcher.gpus_per_node or launcher.cluster == "debug")
    if launcher.cluster != "slurm" and not torch.cuda.is_available():  # the job finds what there is here
        on_gpu = world.device(cfg.device).type == "cuda"
    device = torch.device("cuda" if on_gpu else "cpu")
    n_threads = batch_threads(device) if on_gpu or launcher.cluster == "debug" else launcher.n_threads
    room = launcher.mem_gb * 2**30 / launcher.ranks_per_node if launcher.mem_gb else math.inf
    job = replace(job, cfg=cfg, device=device, n_threads=n_threads)
    _, need = within(job, room)
    if need.host_total > room:
        warn(
            f"--mem-gb {launcher.mem_gb:g} is less than the {count(launcher.ranks_per_node, 'rank')} of a node need: about "
            f"{gb(need.host_total * launcher.ranks_per_node)}, so the job would be refused when it starts."
        )
    return describe_plan(job, need, launcher.n_ranks)


def status(cfg: Status) -> bool:
    """Print what the latest jobs of each run are doing."""
    jobs = _latest(cfg.run)
    states = ask(jobs)
    for job in jobs:
        state = states[job.job_id]
        text = describe_state(state) if state.is_under_way else verdict(job, state)[1]
        print(f"{job.run}\n  {job.kind} {job.job_id}  {text.removesuffix(f': {job.run}')}")
        for line in describe(job, is_running=state.is_at_work) if state.is_under_way else []:
            print(f"  {line}")
        log_fpath = job.log_fpath(0)
        last = tail(log_fpath, cfg.lines)
        for line in [*(line for line in warnings(log_fpath) if line not in last), *last]:
            print(f"  | {line}")
    return True


def cancel(cfg: Cancel) -> bool:
    """End the latest jobs of each run, those that are under way."""
    jobs = _latest(cfg.run)
    states = ask(jobs)
    refused = []
    for job in reversed(jobs):  # else Slurm cancels the replay itself, for want of its extract
        if not states[job.job_id].is_under_way:
            print(f"{job.kind} {job.job_id} has ended already: {job.run}")
            continue
        if why := _cancel(job):
            refused.append(f"{job.kind} {job.job_id} of {job.run}: {why}")
        else:
            print(f"{job.kind} {job.job_id} cancelled: {job.run}")
    if refused:
        raise ConfigError(f"not cancelled: {'; '.join(refused)}.")
    return True


def _cancel(job: Job) -> str:
    """End a job; why it cannot be done from here, or ""."""
    if is_elsewhere(job):
        return f"it was started on {job.host}; cancel it there"
    if job.cluster == "local":
        try:
            tell_to_leave(job)
        except SaevDistError as err:
            return str(err).rstrip(".")
        return ""
    done = call("scancel", job.job_id)
    if done.returncode != 0:
        return (done.stderr.strip().rstrip(".").splitlines() or ["scancel fails"])[-1]
    with suppress(OSError):  # Slurm forgets a job that has not started, and `status` would not know how it ended
        cancelled_fpath(job.folder, job.job_id).touch()
    return ""


def _latest(runs: Sequence[Path]) -> list[Job]:
    jobs: list[Job] = []
    for run_path in runs:
        below = sorted(fpath.parent.parent for fpath in run_path.absolute().glob("*/slurm/jobs.jsonl"))  # of a sweep
        if not (found := latest(run_path.absolute()) or [job for dpath in below for job in latest(dpath)]):
            hint = f" `saev-dist inspect {run_path}` tells what is there." if run_path.is_dir() else ""
            raise ConfigError(f"{run_path}: no job was launched for it ({run_path}/slurm/jobs.jsonl lists none).{hint}")
        jobs += found
    return jobs


if __name__ == "__main__":
    main()
