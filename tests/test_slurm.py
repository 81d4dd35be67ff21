"""Launched on a real Slurm: two nodes of two (pretended) GPUs, on this machine."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slurm.jobs import Job, launched
from slurm.queue import ask
from slurm.watch import describe_state
from tests.ranks import ENV, SLOWLY, artifact_hashes, run_ranks
from tests.slurm_cluster import NODES, Cluster, missing
from tests.synthetic import SETTINGS, make_acts, make_sae, make_shards

if (reason := missing()) and "REQUIRE_SLURM" not in os.environ:
    pytest.skip(reason, allow_module_level=True)

# What is waited for takes seconds; on CI's machine, which has much else to do, a minute.
PATIENCE_S = 300.0
N_IMGS = 6000 if "SLURM_FULL" in os.environ else 1200
"""Batches that two ranks do not get through while a node is drained."""
RANKS = ("--gpus-per-node", "2", "--cpus-per-gpu", "1")  # per node


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="sl") as dpath:  # pytest's own paths are too long
        os.chmod(dpath, 0o755)  # munge insists
        with Cluster(Path(dpath) / "c") as running:
            running.env |= SLOWLY
            yield running


@pytest.fixture(scope="module")
def launch(cluster: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m slurm.launch ARGS` as on a login node."""

    def call(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "slurm.launch", *map(str, args)]
        return subprocess.run(command, env=ENV | cluster.env | env, capture_output=True, text=True, timeout=PATIENCE_S)

    return call


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[object], Callable[[], dict[str, str]]]]:
    """Flags of an extract whose stream takes a while, and what its artifacts are when one process makes them."""
    dpath = tmp_path_factory.mktemp("slow")
    shards, sae = make_shards(dpath / "shards", make_acts(N_IMGS), imgs_per_shard=250), make_sae(dpath / "sae.pt")
    flags = ["--shards", shards, "--sae", sae, "--batch-tokens", "5", "--top-k", "4", "--snapshot-every", "0.5"]
    command = [sys.executable, "-m", "saev_dist", "extract", *map(str, flags), "--out", str(dpath / "alone")]
    alone = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # while others wait

    def expected() -> dict[str, str]:
        assert alone.wait(timeout=PATIENCE_S) == 0
        return artifact_hashes(dpath / "alone")

    yield flags, expected
    alone.kill()
    alone.wait()


@pytest.fixture(scope="module", autouse=True)
def meanwhile(launch, cluster, slow, tmp_path_factory) -> Iterator[dict[str, Future[Any]]]:
    """Jobs that take long for their size, on the CPUs that other tests leave free."""
    dpath = tmp_path_factory.mktemp("meanwhile")

    def kill_a_rank() -> tuple[subprocess.CompletedProcess[str], list[object], Path]:
        run = dpath / "killed"
        command = [
            "--gpus-per-node",
            0,
            "--tasks-per-node",
            2,
            "--cpus-per-gpu",
            1,
            "--wait",
            "extract",
            *slow[0],
            "--out",
            run,
        ]
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(launch, *command)
            until(lambda: launched(run))  # the file is there before its line
            pid = until(lambda: pid_of_rank(latest(run), 1))  # now: the search takes its time, and the stream some seconds
            until(lambda: has_snapshot(run, 2))
            os.kill(pid, signal.SIGKILL)
            return waiting.result(), command, run

    def by_hand() -> tuple[str, str, Path]:
        run, script = dpath / "by hand", Path(__file__).parent.parent / "slurm" / "extract.sbatch"
        command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={dpath}/%j.out", script]
        env = ENV | cluster.env | {"PYTHON": sys.executable}
        command = [*map(str, command), *map(str, slow[0]), "--out", str(run)]
        job_id = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
        until(lambda: has_snapshot(run, 2))
        cluster.ask("scancel", "--signal=USR2", job_id)
        until(lambda: (run / "manifest.json").exists())
        until(lambda: not cluster.ask("squeue", "--noheader", "--jobs", job_id))
        return cluster.ask("scontrol", "show", "job", job_id), (dpath / f"{job_id}.out").read_text(), run

    with ThreadPoolExecutor() as pool:
        yield {"killed": pool.submit(kill_a_rank), "by hand": pool.submit(by_hand)}


def has_snapshot(run: Path, n_ranks: int, after: frozenset[str] | set[str] = frozenset()) -> set[str]:
    """The ranks of the attempt under way by the names of their partials; none unless each has written one after `after`."""
    owners = {fpath.name.split(".")[0] for fpath in (run / "partials").glob("*.partial")} - after
    return owners if {owner[:5] for owner in owners} == {f"{rank:05d}" for rank in range(n_ranks)} else set()


def pid_of_rank(job: Job, rank: int) -> int:
    """The process that does a rank's work."""
    for dpath in Path("/proc").glob("[0-9]*"):
        try:
            words, env = (dpath / "cmdline").read_bytes().split(b"\0"), (dpath / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile
        wanted = {f"SLURM_JOB_ID={job.job_id}".encode(), f"SLURM_PROCID={rank}".encode()}
        if b"submitit.core._submit" in words and b"python" in words[0] and wanted <= set(env):
            return int(dpath.name)
    return 0


def artifacts(run: Path) -> dict[str, str]:
    """Hashes of a run's artifacts: of all its files but the launcher's and the gallery."""
    for name in ("slurm", "visuals"):
        if (run / name).exists():
            (run / name).rename(run.with_name(f"{run.name}-{name}"))
    return artifact_hashes(run)


def latest(run: Path) -> Job:
    return launched(run)[-1]


def until(ready: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    end = time.monotonic() + timeout_s
    while not (answer := ready()):
        assert time.monotonic() < end, f"waited {timeout_s} s"
        time.sleep(0.05)
    return answer


def test_a_pipeline_on_two_nodes_of_two_ranks_has_the_bytes_of_one_process(launch, inputs, tmp_path):
    run = tmp_path / 'it\'s a "run" of $HOME'
    show = "srun --label printenv CUDA_VISIBLE_DEVICES | sort"
    done = launch("--nodes", 2, *RANKS, "--wait", "--setup", show, "pipeline", *inputs, "--out", run, "--", "--no-pictures", "--n-features", 5, RANK="7", MASTER_PORT="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"extract \d+ done.*replay \d+ done", done.stdout, re.S), done.stdout
    extract, replay = launched(run)
    assert {end.rank for end in extract.ends()} == {0, 1, 2, 3}
    assert re.findall(r"^(\d): (.*)$", extract.log_fpath(0).read_text(), re.M) == [(str(rank), "0,1") for rank in range(4)]
    assert "scores equal the stored ones" in replay.log_fpath(0).read_text()
    assert (run / "visuals" / "index.html").exists()
    assert run_ranks("verify", "--run", run, "--all").returncode == 0
    assert run_ranks("extract", *inputs, "--out", tmp_path / "alone").returncode == 0
    assert artifacts(run) == artifacts(tmp_path / "alone")


def test_a_sweep_reports_its_bad_checkpoint_and_finishes_the_others(launch, inputs, tmp_path):
    good, bad, third = (tmp_path / f"{name}.pt" for name in ("good", "bad", "third"))
    make_sae(good)
    make_sae(third, seed=5)
    bad.write_bytes(b"no checkpoint")
    shards = inputs[:2]
    command = ["--gpus-per-node", 1, "--cpus-per-gpu", 1, "--wait", "extract", *shards, *SETTINGS, "--sae", good, bad, third, "--out", tmp_path / "runs"]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 1
    (error,) = re.findall(r"^extract \d+_1 failed: rank 0: .*bad\.pt.*$", done.stderr, re.M)
    assert "Traceback" not in done.stdout + done.stderr and error.count("\n") == 0
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/manifest.json")} == {"good", "third"}
    assert run_ranks("extract", *shards, *SETTINGS, "--sae", third, "--out", tmp_path / "alone").returncode == 0
    assert artifacts(tmp_path / "runs" / "third") == artifacts(tmp_path / "alone")
    again = launch(*command)
    assert again.stdout.count("is finished: no extract") == 2 and again.returncode == 1
    assert re.search(r"^extract \d+ failed: rank 0: .*bad\.pt", again.stderr, re.M)


def test_what_no_node_can_give_is_refused_at_once(launch, inputs, tmp_path):
    done = launch("--gpus-per-node", 3, "extract", *inputs, "--out", tmp_path / "run")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "Slurm refuses the extract job" in line and "--gpus-per-node" in line
    done = launch("--slurm-args", "color=red", "extract", *inputs, "--out", tmp_path / "run")
    assert "Slurm refuses the extract job: unrecognized option '--color=red'. (see --slurm-args.)" in done.stderr


def test_a_job_that_must_wait_says_why_and_can_be_cancelled(launch, cluster, inputs, tmp_path):
    run = tmp_path / "run"
    done = launch(
        "--gpus-per-node", 1, "--cpus-per-gpu", 1, "--slurm-args", "begin=now+1hour", "pipeline", *inputs, "--out", run
    )
    assert done.returncode == 0
    both = r"extract \d+  waits in the queue: BeginTime.*replay \d+  waits in the queue: (BeginTime|Dependency)"
    assert re.search(both, launch("status", "--run", run).stdout, re.S)
    second = launch("--gpus-per-node", 1, "extract", *inputs, "--out", run)
    assert second.returncode == 1 and "works on it (waits in the queue: BeginTime)" in second.stderr
    assert re.search(r"replay \d+ cancelled.*extract \d+ cancelled", launch("cancel", "--run-dir", run).stdout, re.S)
    assert re.search(r"extract \d+  cancelled\. Launch it again", launch("status", "--run", run).stdout)
    assert launch("cancel", "--run", run).stdout.count("has ended already") == 2


def test_a_job_that_can_never_start_says_so(launch, cluster, inputs, tmp_path):
    run = tmp_path / "run"
    assert launch("--nodes", 5, "--gpus-per-node", 0, "extract", *inputs, "--out", run).returncode == 0
    until(lambda: "this partition will never start it" in launch("status", "--run", run).stdout)
    assert "cancelled" in launch("cancel", "--run", run).stdout


def test_submitting_loads_no_torch(launch, cluster, inputs, tmp_path):
    run = tmp_path / "run"
    script = """import atexit, sys
atexit.register(lambda: print("loaded", {"torch", "numpy"} & set(sys.modules)))
from slurm.launch import main
main(sys.argv[1:])"""
    command = ["--gpus-per-node", 1, "--cpus-per-gpu", 1, "extract", *inputs, "--out", run]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)], env=ENV | cluster.env, capture_output=True, text=True
    )
    assert re.findall(r"^loaded (.*)$", done.stdout, re.M) == ["set()"]
    until(lambda: (run / "manifest.json").exists())


def test_told_to_leave_and_requeued_it_goes_on_and_has_the_same_bytes(launch, cluster, slow, tmp_path, monkeypatch):
    flags, expected = slow
    run = tmp_path / "run"
    assert launch("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "extract", *flags, "--out", run).returncode == 0
    job = latest(run)
    first = until(lambda: has_snapshot(run, 2))
    cluster.ask("scancel", "--signal=USR2", job.job_id)  # as before the time limit: it requeues itself
    second = until(lambda: has_snapshot(run, 2, after=first))
    cluster.ask("scontrol", "requeue", job.job_id)  # Slurm requeues it
    until(lambda: has_snapshot(run, 2, after=first | second))
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])  # `status` itself might start too late to see it run
    assert re.search(r"running .* on 127\.0\.0\.\[1-2\], requeued 2 times", describe_state(ask([job])[job.job_id]))
    until(lambda: (run / "manifest.json").exists())
    until(lambda: re.search(r"^  extract \d+  done$", launch("status", "--run", run).stdout, re.M))
    assert {(end.rank, end.attempt, end.outcome) for end in job.ends()} == {(0, 2, "done"), (1, 2, "done")}
    log = job.log_fpath(0).read_text()
    assert "SIGUSR2" in log and "Requeued job" in log and "COMPLETING: what follows is up to Slurm" in log
    assert artifacts(run) == expected()


def test_a_killed_rank_ends_the_job_with_its_cause_and_launched_again_it_goes_on(launch, slow, meanwhile):
    killed, command, run = meanwhile["killed"].result()
    assert killed.returncode == 1
    assert re.search(r"^extract \d+ failed: rank 0: rank 1 of 2 died .*\(rank 1 left no word: killed, perhaps for want of memory\.\)", killed.stderr, re.M), killed.stderr  # fmt: skip
    again = launch(*command)
    assert again.returncode == 0, again.stderr
    assert artifacts(run) == slow[1]()


def test_a_plain_sbatch_file_requeues_itself_and_has_the_same_bytes(slow, meanwhile):
    job, log, run = meanwhile["by hand"].result()
    assert "JobState=COMPLETED" in job and "Restarts=1" in job, job
    assert "SIGUSR2" in log and log.count("wall time") == 1
    assert artifacts(run) == slow[1]()


# ---- minutes each: Slurm looks at time limits twice a minute. `make test-slurm-full`

full = pytest.mark.skipif("SLURM_FULL" not in os.environ, reason="takes minutes: make test-slurm-full")


@full
def test_at_the_time_limit_and_when_preempted_it_comes_back_with_the_same_bytes(launch, cluster, tmp_path):
    shards, sae = make_shards(tmp_path / "shards", make_acts(12_000), imgs_per_shard=1000), make_sae(tmp_path / "sae.pt")
    flags = ["--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 1]
    run = tmp_path / "run"
    alone = ThreadPoolExecutor().submit(
        run_ranks, "extract", *flags, "--out", tmp_path / "alone", timeout_s=2 * PATIENCE_S
    )  # while Slurm waits
    done = launch("--nodes", 1, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "--time-h", 0.03, "--margin-s", 100, "extract", *flags, "--out", run)  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = latest(run)

    def requeues() -> int:
        return int(cluster.ask("squeue", "--noheader", "--states=all", "--jobs", job.job_id, "--Format=RestartCnt").strip())

    until(lambda: requeues() == 1)  # the time limit
    cluster.ask("scontrol", "update", f"jobid={job.job_id}", "TimeLimit=60")  # which is not to come again
    first = until(lambda: has_snapshot(run, 1))
    until(lambda: has_snapshot(run, 1, after=first))
    urgent = cluster.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=sleep 1")  # fmt: skip
    until(lambda: requeues() == 2)  # preempted
    until(lambda: "COMPLETED" in cluster.ask("scontrol", "show", "job", urgent.strip()))
    until(lambda: (run / "manifest.json").exists(), 2 * PATIENCE_S)
    until(lambda: re.search(r"^  extract \d+  done$", launch("status", "--run", run).stdout, re.M))
    assert job.log_fpath(0).read_text().count(": leaving, after this batch") == 2
    assert alone.result().returncode == 0
    assert artifacts(run) == artifacts(tmp_path / "alone")


@full
def test_readmes_commands_on_slurm_make_a_gallery(cluster, tmp_path):
    root = Path(__file__).parent.parent
    (command,) = re.findall(r"^    python (-m slurm\.launch .*)$", (root / "README.md").read_text(), re.M)
    (tmp_path / "tests").symlink_to(root / "tests")
    command = [sys.executable, *command.split()]
    done = subprocess.run(command, cwd=tmp_path, env=ENV | cluster.env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "slurm" / "visuals" / "index.html").exists()


@full
def test_after_so_many_requeues_it_stops_and_says_so(launch, cluster, slow, tmp_path):
    run = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(launch, "--max-requeues", 0, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "--wait", "extract", *slow[0], "--out", run)  # fmt: skip
        until(lambda: has_snapshot(run, 1))
        cluster.ask("scancel", "--signal=USR2", latest(run).job_id)
        done = waiting.result()
    assert done.returncode == 1
    assert re.search(r"stopped: SIGUSR2.*after 0 of at most 0 requeues\. Launch it again", done.stderr)


@full
def test_a_node_that_goes_down_costs_an_attempt(launch, cluster, slow, tmp_path):
    flags, expected = slow
    run = tmp_path / "run"
    assert launch("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "extract", *flags, "--out", run).returncode == 0
    until(lambda: has_snapshot(run, 2))
    cluster.ask("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=test")
    until(lambda: (run / "manifest.json").exists())
    until(lambda: re.search(r"^  extract \d+  done$", launch("status", "--run", run).stdout, re.M))
    assert {end.attempt for end in latest(run).ends()} == {1}
    assert artifacts(run) == expected()


@full
def test_on_another_node_it_goes_on_and_the_gallery_follows(launch, cluster, slow, tmp_path):
    flags, expected = slow
    run = tmp_path / "run"
    assert (
        launch(
            *RANKS, "--signal", "USR1", "pipeline", *flags, "--out", run, "--", "--no-pictures", "--n-features", 3
        ).returncode
        == 0
    )
    extract, replay = launched(run)
    until(lambda: has_snapshot(run, 2))
    here = cluster.ask("squeue", "--noheader", "--jobs", extract.job_id, "--format=%N").strip()
    cluster.ask("scontrol", "update", f"nodename={here}", "state=drain", "reason=test")  # takes no new job
    try:
        cluster.ask("scancel", "--signal=USR1", extract.job_id)
        until(lambda: (run / "manifest.json").exists())
        (there,) = set(NODES) - {here}
        assert f"NodeList={there}" in cluster.ask("scontrol", "show", "job", extract.job_id)
    finally:  # other tests need it
        cluster.ask("scontrol", "update", f"nodename={here}", "state=resume")
    until(lambda: launch("status", "--run", run).stdout.count("  done\n") == 2)
    assert "SIGUSR1: leaving, after this batch" in extract.log_fpath(0).read_text()
    assert {end.attempt for end in extract.ends()} == {1} and {end.attempt for end in replay.ends()} == {0}
    assert (run / "visuals" / "index.html").exists()
    assert artifacts(run) == expected()


@full
def test_a_replay_that_is_told_to_leave_goes_on(launch, cluster, slow, tmp_path):
    run = tmp_path / "run"
    assert (
        launch("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "--wait", "extract", *slow[0], "--out", run).returncode
        == 0
    )
    assert launch("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "replay", "--run", run, "--all", "--no-pictures", "--img-scale", 8).returncode == 0  # fmt: skip
    job = latest(run)
    until(lambda: any(fpath.stat().st_size for fpath in run.glob("visuals.partial/records.*.bin")))
    cluster.ask("scancel", "--signal=USR2", job.job_id)
    until(lambda: (run / "visuals" / "index.html").exists())
    until(lambda: launch("status", "--run", run).stdout.count("  done\n") == 2)
    assert {end.attempt for end in job.ends()} == {1}
    assert "visuals.partial. Run the same command again" in job.log_fpath(0).read_text()
