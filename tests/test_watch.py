"""What became of a job: how the launcher reads it from Slurm, the ranks' words, logs and partials."""

import math
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import slurm.launch
import slurm.progress
import slurm.watch
from saev_dist.config import Extract
from saev_dist.errors import ConfigError
from slurm.config import Launcher
from slurm.jobs import End, Job, end_fpath, latest, launched, remember, tail
from slurm.launch import main, run
from slurm.progress import Kept, describe
from slurm.queue import State, ask
from slurm.watch import describe_state, follow, result, verdict
from tests.ranks import run_ranks
from tests.synthetic import make_acts, make_sae, make_shards


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        cluster="slurm",
        kind="extract",
        job_id="12_3",
        run=tmp_path / "run",
        folder=tmp_path,
        n_ranks=2,
        max_requeues=5,
        time_h=4,
        mem_gb=64,
    )


def ended(job: Job, *ends: End) -> Job:
    for end in ends:
        end.write(end_fpath(job.folder, job.job_id, end.rank))
    return job


LEFT = [End(rank=rank, attempt=5, outcome="left", error="SIGUSR2: stopped, and all is kept. Do.") for rank in (0, 1)]
ECHO = End(rank=0, attempt=0, outcome="failed", error="rank 1: no such layer", is_echo=True)
BAD = End(rank=1, attempt=0, outcome="failed", error="no such layer")


def test_the_result_holds_what_was_warned_of_once(job):
    job.folder.mkdir(parents=True, exist_ok=True)
    warning = "saev-dist: warning: on 512 tokens"
    bar = "extract  50.0%  1/2 tokens"
    lines = ["submitit INFO", warning, *[bar] * 3000, warning, bar, "tokens  2", "L0      1"]
    job.log_fpath(0).write_text("\n".join(lines))
    assert result(job) == [warning, "tokens  2", "L0      1"]


@pytest.mark.parametrize(
    ("state", "ends", "text"),
    [
        ("OUT_OF_MEMORY", [], "failed: out of memory: it had 64 GB per node. Raise --mem-gb"),
        ("TIMEOUT", [], "failed: the time limit of 4 h, with no requeue in time: raise --margin-s. Launch it again"),
        ("NODE_FAIL", [], "failed: a node went down (n1). Launch it again"),
        ("CANCELLED", LEFT, "cancelled. Launch it again"),
        ("FAILED", LEFT, "stopped: SIGUSR2, after 5 of at most 5 requeues. Launch it again"),
        ("FAILED", [ECHO, BAD], "failed: rank 1: no such layer Log: "),
        ("FAILED", [replace(BAD, outcome="crashed", error="KeyError: 3")], "crashed: rank 1: KeyError: 3 (rank 0 left no word"),
        ("FAILED", [], "failed: ranks 0, 1 left no word: killed, perhaps for want of memory. Last in the log: oh dear"),
        ("FAILED", [replace(LEFT[0], attempt=0)], "stopped: SIGUSR2, after 0 of at most 5 requeues. Launch"),
        ("FAILED", [replace(LEFT[0], attempt=6)], "stopped: SIGUSR2, after 6 of at most 5 requeues"),
        ("FORGOTTEN", [], "failed: ranks 0, 1 left no word"),
    ],
)
def test_a_failure_is_told_by_its_cause(job, state, ends, text):
    job.log_fpath(0).write_text("a line\noh dear\n")
    well, found = verdict(ended(job, *ends), State(name=state, nodes="n1"))
    assert not well and found.startswith(text), found


@pytest.mark.parametrize(("kind", "flags"), [("extract", "--read-ahead"), ("replay", "--workers or --img-scale")])
def test_what_to_lower_for_want_of_memory_is_a_flag_of_the_job(job, kind, flags):
    found = verdict(replace(job, kind=kind), State(name="OUT_OF_MEMORY"))[1]
    assert f"Raise --mem-gb, or lower {flags}. Log: " in found


def test_nobody_would_have_requeued_a_job_of_this_machine(job):
    job = replace(job, cluster="local")
    assert verdict(ended(job, replace(LEFT[0], attempt=0)), State(name="FAILED"))[1].startswith("stopped: SIGUSR2. Launch it")


def test_a_replay_whose_extract_failed_says_so(job):
    assert "did not succeed" in verdict(job, State(name="CANCELLED", reason="DependencyNeverSatisfied"))[1]


def test_a_job_that_cannot_be_noted_is_told_of_and_the_others_are_noted(tmp_path, job, monkeypatch, capsys):
    jobs = [replace(job, run=tmp_path / name, job_id=name) for name in ("a", "b")]
    (tmp_path / "a/slurm/jobs.jsonl").mkdir(parents=True)
    monkeypatch.setattr(slurm.launch, "submit", lambda *args: jobs)
    cfgs = [Extract(shards=tmp_path, sae=tmp_path, out=job.run) for job in jobs]
    assert slurm.launch._submitted(Launcher(), cfgs) == jobs
    assert [job.job_id for job in launched(tmp_path / "b")] == ["b"]
    out, err = capsys.readouterr()
    assert "extract a " in out and "extract b " in out
    assert "extract a could not be noted" in err and "Is a directory" in err


def test_success_is_the_word_of_all_ranks_whatever_slurm_remembers(job):
    ended(job, *(End(rank=rank, attempt=1, outcome="done") for rank in (0, 1)))
    assert verdict(job, State(name="FORGOTTEN"))[0] and verdict(job, State(name="COMPLETED"))[0]


def test_slurm_may_know_of_a_success_before_the_ranks_words_are_seen(job):
    assert verdict(job, State(name="COMPLETED"))[0] and not verdict(job, State(name="FAILED"))[0]


@pytest.mark.parametrize("outcome", ["done", "left", "failed"])
def test_words_of_an_earlier_attempt_are_not_taken_for_the_outcome(job, outcome):
    job.log_fpath(0).touch()
    ended(job, *(End(rank=rank, attempt=0, outcome=outcome) for rank in (0, 1)))
    assert verdict(job, State(name="FAILED", n_requeues=1))[1].startswith("failed: ranks 0, 1 left no word")
    ended(job, replace(BAD, attempt=1))
    assert verdict(job, State(name="FORGOTTEN"))[1].startswith("failed: rank 1: no such layer (rank 0 left no word")


def test_the_jobs_of_a_run_are_its_last_extract_and_the_replay_since(job):
    def ids() -> list[str]:
        return [found.job_id for found in latest(job.run)]

    assert ids() == []
    for number, kind, expected in (
        (1, "replay", ["1"]),
        (2, "extract", ["2"]),
        (3, "replay", ["2", "3"]),
        (4, "replay", ["2", "4"]),
        (5, "extract", ["5"]),
    ):
        remember(replace(job, job_id=str(number), kind=kind))
        assert ids() == expected


def test_requeues_are_counted_wherever_the_job_is(job):
    waiting, running = State(name="PENDING", reason="BeginTime", n_requeues=1), State(name="RUNNING", nodes="n1", n_requeues=2)
    assert describe_state(waiting) == "waits in the queue: BeginTime, requeued 1 time"
    assert describe_state(running) == "running on n1, requeued 2 times"


def test_a_logs_last_lines_are_those_of_the_job(job):
    fpath = job.log_fpath(0)
    fpath.write_text("one\ntwo 10%\rtwo 20%\n\nthree\nsubmitit INFO (2026) - Job completed successfully\n")
    assert [tail(fpath, n) for n in (0, 2, 9)] == [[], ["two 20%", "three"], ["one", "two 10%", "two 20%", "three"]]
    assert tail(job.log_fpath(1), 3) == []


def test_progress_needs_no_sight_of_the_shards(tmp_path, job):
    """Nor of anything else but the run; and of a job that waits again it does not tell what an earlier attempt said."""
    shards, sae = make_shards(tmp_path / "shards", make_acts(12)), make_sae(tmp_path / "sae.pt")
    flags = ["--shards", shards, "--sae", sae, "--batch-tokens", 5, "--snapshot-every", 0, "--out", job.run]
    die = "import os, saev_dist.extract as e; f, n = e._rows, iter('123'); e._rows = lambda *a: f(*a) if next(n, 0) else os._exit(9)"
    assert run_ranks("extract", *flags, before=die).returncode == 9
    shutil.rmtree(shards)
    job.log_fpath(1).write_text("[rank 1] extract  45.2%  ETA 0:01:02\n")
    kept, *ranks = describe(job, is_running=True)
    assert re.match(r"[\d.]+% of 12 batches are kept on the disk; ETA ", kept), kept
    assert ranks[-1] == "rank 1: extract  45.2%  ETA 0:01:02"
    assert describe(job, is_running=False) == [kept.split(";")[0]]


def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


INVALID = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
NO_ACCOUNTING = "echo Slurm accounting storage is disabled >&2; exit 1"


@pytest.mark.parametrize(
    ("squeue", "sacct", "name"),
    [
        (INVALID, NO_ACCOUNTING, "FORGOTTEN"),
        (INVALID, "echo '12_3|CANCELLED by 1000|00:01:00|n1'", "CANCELLED"),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "exit 1", "UNKNOWN"),
        ("printf 'squeue: error: DNS\\nsqueue: fatal: no configuration\\n' >&2; exit 1", "exit 1", "UNKNOWN"),
        ("printf '%-40s%-20s%-50s%-12s%-20s%-200s\\n' 12_3 PENDING Resources 2 0:00 ''", "exit 1", "PENDING"),
    ],
)
def test_slurm_is_asked_with_and_without_accounting(tmp_path, monkeypatch, job, squeue, sacct, name):
    commands(tmp_path, monkeypatch, squeue=squeue, sacct=sacct)
    state = ask([job])["12_3"]
    assert state.name == name
    assert "\n" not in state.reason
    if name == "PENDING":
        assert (state.reason, state.n_requeues) == ("Resources", 2)


def test_a_job_that_nobody_remembers_is_not_waited_for_without_end(tmp_path, monkeypatch, job, capsys):
    commands(tmp_path, monkeypatch, squeue=INVALID, sacct=NO_ACCOUNTING)
    monkeypatch.setattr(slurm.watch, "POLL_S", (0.01, 0.01))
    monkeypatch.setattr(slurm.watch, "FORGOTTEN_S", 0.05)
    assert follow([job]) is False
    assert "failed: no rank left a word or a log" in capsys.readouterr().err


def test_a_requeue_that_looks_like_an_end_for_a_moment_is_none(monkeypatch, job, capsys):
    names = iter(["RUNNING", "NODE_FAIL", "PENDING", "RUNNING", "COMPLETED"])
    ended(job, *(End(rank=rank, attempt=1, outcome="done") for rank in (0, 1)))
    monkeypatch.setattr(slurm.watch, "ask", lambda jobs: {"12_3": State(name=next(names))})
    monkeypatch.setattr(slurm.watch, "POLL_S", (0.0, 0.0))
    assert follow([job]) is True
    assert next(names, None) is None


def test_a_rate_is_that_of_this_attempt():
    def header(rank: int, owner: str, first: int, stop: int) -> SimpleNamespace:
        owner = f"{rank:05d}-{owner}"
        return SimpleNamespace(
            owner=owner, n_batches=stop - first, segments=[SimpleNamespace(first=first, stop=stop, owner=owner)]
        )

    old, new = header(0, "aa", 0, 400), header(1, "bb", 400, 500)
    text = Kept(1000, [(old, 5000.0), (new, 100.0)], attempt_s=200.0).text()
    assert text.startswith("50.0% of 1,000 batches are kept") and "ETA 0:06:40" in text  # 1 batch/s; 100 done since
    assert "no snapshot of this attempt yet" in Kept(1000, [(old, 5000.0)], attempt_s=200.0).text()


def test_a_partial_that_has_just_been_replaced_counts_as_an_earlier_attempts(tmp_path):
    (tmp_path / "there").touch()
    os.utime(tmp_path / "there", (1000, 1000))
    assert slurm.progress._age_s(tmp_path / "there", 1005.0) == 5
    assert slurm.progress._age_s(tmp_path / "gone", time.time()) == math.inf


def test_a_run_that_nobody_launched_is_said(tmp_path, capsys):
    for command in ("status", "cancel"):
        with pytest.raises(SystemExit, match=r"^1$"):
            main([command, "--run", str(tmp_path)])
        assert "no job was launched for it" in capsys.readouterr().err


def test_the_directory_of_a_sweep_stands_for_its_runs(job, monkeypatch, capsys):
    runs = [job.run.parent / "sweep" / name for name in ("a", "b")]
    for run_path in runs:
        remember(replace(job, run=run_path))
    monkeypatch.setattr(slurm.launch, "ask", lambda jobs: {job.job_id: State(name="COMPLETED") for job in jobs})
    assert run(["status", "--run", str(runs[0].parent)])
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if not line.startswith(" ")] == list(map(str, runs)), said


def test_a_job_of_another_machine_is_asked_for_and_cancelled_there(job, monkeypatch, capsys):
    """Its process number means something else here."""
    remember(replace(job, cluster="local", job_id=str(os.getpid()), host="workstation-a"))
    monkeypatch.setattr(slurm.submit.os, "kill", lambda *_: pytest.fail("another process was told to leave"))
    assert run(["status", "--run", str(job.run)])
    assert "it was started on workstation-a: ask there" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="it was started on workstation-a; cancel it there"):
        run(["cancel", "--run", str(job.run)])
    (job.run / "slurm" / "jobs.jsonl").unlink()
    remember(ended(replace(job, cluster="local", host="gone"), *(End(rank=rank, attempt=0, outcome="done") for rank in (0, 1))))
    assert run(["status", "--run", str(job.run)]) and run(["cancel", "--run", str(job.run)])
    said = capsys.readouterr().out
    assert "done\n" in said and "has ended already" in said, said


def test_what_cannot_be_cancelled_keeps_nothing_else_from_it(tmp_path, job, monkeypatch, capsys):
    commands(tmp_path, monkeypatch, scancel="[ $1 != 12_3 ] || { echo 'scancel: error: Access denied' >&2; exit 1; }")
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for i, dpath in enumerate(runs):
        remember(replace(job, run=dpath, job_id=f"12_{i + 2}"))
    monkeypatch.setattr(slurm.launch, "ask", lambda jobs: {job.job_id: State(name="RUNNING") for job in jobs})
    with pytest.raises(ConfigError, match=f"^not cancelled: extract 12_3 of {runs[1]}: scancel: error: Access denied.$"):
        run(["cancel", "--run", *map(str, runs)])
    assert capsys.readouterr().out.splitlines() == [f"extract 12_4 cancelled: {runs[2]}", f"extract 12_2 cancelled: {runs[0]}"]


def test_of_a_job_that_waits_again_no_rank_is_shown_at_work(job, monkeypatch, capsys):
    remember(job)
    job.log_fpath(0).write_text("extract  45.2%  ETA 0:01:02\n")
    for name, is_shown in (("PENDING", False), ("RUNNING", True)):
        monkeypatch.setattr(slurm.launch, "ask", lambda jobs, name=name: {job.job_id: State(name=name) for job in jobs})
        assert run(["status", "--run", str(job.run), "--lines", "0"])
        assert ("ETA 0:01:02" in capsys.readouterr().out) == is_shown


def test_away_from_the_cluster_status_and_cancel_say_so(job, monkeypatch, capsys):
    remember(job)
    monkeypatch.setenv("PATH", str(job.run))
    assert run(["status", "--run", str(job.run)])
    assert "no answer from Slurm: squeue is not on PATH" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="scancel is not on PATH"):
        run(["cancel", "--run", str(job.run)])


def test_a_line_that_is_no_job_hides_no_other_one(tmp_path, job, capsys):
    for content in (b"", b"{}\n", b'{"cluster": "slu', b"\xff\n"):
        fpath = job.run / "slurm/jobs.jsonl"
        fpath.parent.mkdir(parents=True, exist_ok=True)
        fpath.write_bytes(content)
        remember(job)
        assert launched(job.run) == [job]
        assert (f"{fpath}: line 1 is no job; if one was launched" in capsys.readouterr().err) == bool(content)


def test_a_run_that_was_moved_keeps_its_jobs_and_a_copy_has_none(tmp_path, job):
    job = replace(job, run=tmp_path / "runs/a", folder=tmp_path / "runs/slurm")
    remember(job)
    job.folder.mkdir()
    ended(job, LEFT[0])
    shutil.copytree(job.run, tmp_path / "runs/b")
    assert launched(tmp_path / "runs/b") == [] and launched(job.run) == [job]
    (tmp_path / "runs").rename(tmp_path / "moved")
    (moved,) = launched(tmp_path / "moved/a")
    assert (moved.run, moved.folder) == (tmp_path / "moved/a", tmp_path / "moved/slurm")
    assert [end.rank for end in moved.ends()] == [0]


def test_a_job_without_a_word_or_a_log_is_not_said_to_want_memory(job):
    said = verdict(job, State(name="FORGOTTEN"))[1]
    assert "no rank left a word or a log" in said and str(job.folder) in said and "finished" not in said
    job.run.mkdir()
    (job.run / "manifest.json").touch()
    assert verdict(job, State(name="FORGOTTEN"))[1].endswith("The run is finished.")


def test_an_array_s_job_that_was_cancelled_while_it_waited_is_told_as_cancelled(job, tmp_path, monkeypatch):
    remember(job)
    monkeypatch.setattr(slurm.launch, "ask", lambda jobs: {job.job_id: State(name="PENDING") for job in jobs})
    commands(tmp_path, monkeypatch, scancel="exit 0")
    assert run(["cancel", "--run", str(job.run)])
    assert verdict(job, State(name="FORGOTTEN"))[1].startswith("cancelled. ")
