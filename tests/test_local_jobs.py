"""The launcher's jobs on this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit

from saev_dist.config import Extract
from saev_dist.errors import ConfigError, SaevDistError
from slurm.config import Launcher
from slurm.jobs import End, cancelled_fpath, end_fpath, launched
from slurm.launch import run
from slurm.progress import describe
from slurm.queue import ask
from slurm.submit import submit
from tests.crash import wait_for
from tests.ranks import ENV, STAYING, artifact_hashes, launch, leading_a_group, run_ranks
from tests.synthetic import SETTINGS, make_acts, make_sae, make_shards

TO_STAY = ["env", *(f"{name}={value}" for name, value in STAYING.items())]
IN_THE_BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
"""What `launch … &` in a script does to SIGINT."""


def wait_beside(waiting: Future[Any], condition: Callable[[], Any]) -> None:
    """Wait for what comes before a launcher's end."""
    wait_for(lambda: condition() or waiting.done())
    assert not waiting.done(), waiting.result()


def are_at_work(run: Path) -> bool:
    """Whether both ranks have done something, and so keep it when they are told to leave."""
    return all(list(run.glob(f"partials/*.{rank:05d}-*.bin")) for rank in range(2))


def test_local_ranks_have_the_bytes_of_one_process_and_the_gallery_follows(tmp_path, inputs, monkeypatch):
    monkeypatch.setitem(ENV, "PYTHONIOENCODING", "ascii")
    run = tmp_path / 'a "run" of it\'s own…'
    done = launch(
        "--cluster", "local", "--gpus-per-node", 2, "--partition", "gpu", "--mem-gb", 9, "--setup", "true", "pipeline", *inputs,
        "--out", run, "--", "--no-pictures", "--n-features", 3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: --cluster local takes no notice of --partition, --mem-gb.\n" in done.stderr
    assert re.search(r"extract \d+ done.*tokens +115 of 23 images.*replay \d+ done.*gallery", done.stdout, re.S)
    assert [job.kind for job in launched(run)] == ["extract", "replay"]
    assert re.findall(r"^  (\w+) \d+  done$", launch("status", "--run", run).stdout, re.M) == ["extract", "replay"]
    (run / "slurm").rename(tmp_path / "logs")
    (run / "visuals").rename(tmp_path / "visuals")
    assert run_ranks("extract", *inputs, "--out", tmp_path / "alone").returncode == 0
    assert artifact_hashes(run) == artifact_hashes(tmp_path / "alone")


def test_a_local_job_that_is_told_to_leave_comes_back_and_has_the_same_bytes(tmp_path):
    shards, sae = make_shards(tmp_path / "shards", make_acts(600), imgs_per_shard=200), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 0.2, "--out"]
    run = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(launch, "--cluster", "local", "--gpus-per-node", 2, *args, run, under=TO_STAY)
        wait_beside(waiting, lambda: list(run.glob("partials/*.partial")) and are_at_work(run))
        (job,) = launched(run)
        lines = "\n".join(describe(job, is_running=True))
        os.kill(int(job.job_id), signal.SIGTERM)
        done = waiting.result()
    assert re.match(r"[\d.]+% of 600 batches are kept on the disk", lines), lines
    assert done.returncode == 0, done.stderr
    assert {(end.attempt, end.outcome) for end in job.ends()} == {(1, "done")}
    (run / "slurm").rename(tmp_path / "logs")
    assert run_ranks(*args, tmp_path / "alone").returncode == 0
    assert artifact_hashes(run) == artifact_hashes(tmp_path / "alone")


def test_a_local_job_has_the_gpus_of_its_shell_and_can_be_cancelled_behind_another(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "CUDA_VISIBLE_DEVICES", "5,7,8")
    shards, sae = make_shards(tmp_path / "shards", make_acts(600), imgs_per_shard=200), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 0.2, "--out"]
    out, show = tmp_path / "run", f"echo $CUDA_VISIBLE_DEVICES >{tmp_path}/gpus"
    flags = ["--cluster", "local", "--gpus-per-node", 2, "--setup", show, "--wait"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(launch, *flags, *args, out, under=[*TO_STAY, *IN_THE_BACKGROUND])
        wait_beside(waiting, lambda: list(out.glob("partials/*.partial")))
        assert run(["cancel", "--run", str(out)])
        done = waiting.result()
    assert done.returncode == 1 and re.search(r"^extract \d+ cancelled\. Launch it again", done.stderr, re.M)
    assert not (out / "manifest.json").exists() and (tmp_path / "gpus").read_text() == "5,7\n"


@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_an_interrupted_launcher_ends_its_local_job_in_order(tmp_path, whom):
    shards, sae = make_shards(tmp_path / "shards", make_acts(600), imgs_per_shard=200), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 600, "--out"]
    out = tmp_path / "run"
    command = [*TO_STAY, sys.executable, "-m", "slurm.launch"]
    command += ["--cluster", "local", "--gpus-per-node", 0, "--tasks-per-node", 2]
    in_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as there, wherever the tests run
    with leading_a_group([*command, *args, out], preexec_fn=in_a_terminal) as process:
        wait_for(lambda: are_at_work(out) or process.poll() is not None)  # far from a snapshot
        if whom == "all":  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 130 and "Traceback" not in said, said
        assert re.search(r"told to keep what is done and leave.*cancelled\. Launch it again.*no longer waiting", said, re.S), (
            said
        )
        (job,) = launched(out)
        assert list(out.glob("partials/*.partial"))
        wait_for(lambda: not os.path.exists(f"/proc/{job.job_id}"))  # its ranks have ended; what started them follows
    assert run_ranks(*args, out).returncode == 0


@pytest.mark.parametrize("setup", [[], ["--setup", "sleep 1"]], ids=["", "setup"])
def test_a_local_job_can_be_cancelled_before_it_is_at_work(tmp_path, setup):
    shards, sae = make_shards(tmp_path / "shards", make_acts(600), imgs_per_shard=200), make_sae(tmp_path / "sae.pt")
    out = tmp_path / "run"
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--out", out]
    flags = ["--cluster", "local", "--gpus-per-node", 0, "--tasks-per-node", 2, *setup]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(launch, *flags, *args, under=TO_STAY)
        wait_beside(waiting, lambda: launched(out))
        run(["cancel", "--run", str(out)])
        done = waiting.result()
    assert done.returncode == 1 and re.search(r"^extract \d+ cancelled\. Launch it again", done.stderr, re.M), done.stderr


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/dash"])
@pytest.mark.parametrize("setup", [(), ("true",)], ids=["", "setup"])
def test_a_local_job_comes_back_as_often_as_it_may_and_is_known_by_its_number(tmp_path, monkeypatch, shell, setup):
    """submitit stops after six attempts; bash runs the last command of a shell in the shell's own place."""

    def leave() -> None:
        with open(tmp_path / "attempts", "a") as file:
            file.write(os.environ["SUBMITIT_LOCAL_JOB_ID"] + "\n")
        for _ in range(6000):
            if (tmp_path / "asked").exists():
                break
            time.sleep(0.01)
        raise SystemExit(144)  # what submitit takes for a wish to be started again

    def popen(command, **settings):
        started.append(subprocess.Popen(command, **settings | ({"executable": shell} if settings["shell"] else {})))
        return started[-1]

    started: list[subprocess.Popen] = []
    monkeypatch.setattr("slurm.submit.Task", lambda **_: leave)
    monkeypatch.setattr("submitit.local.local.subprocess", SimpleNamespace(Popen=popen))
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path)
    (job,) = submit(Launcher(cluster="local", gpus_per_node=0, setup=setup, max_requeues=7), [cfg], tmp_path / "my logs")
    assert ask([job])[job.job_id].is_at_work
    assert not ask([replace(job, folder=tmp_path / "another's")])[job.job_id].is_under_way  # whose number this one has now
    (tmp_path / "asked").touch()
    started[0].wait(100)
    assert (tmp_path / "attempts").read_text() == f"{job.job_id}\n" * 8
    assert not ask([job])[job.job_id].is_under_way


def test_what_an_earlier_job_of_that_number_left_is_forgotten(tmp_path, monkeypatch):
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path)
    job = SimpleNamespace(job_id="123", paths=SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(submitit.LocalExecutor, "submit_array", lambda *_: [job])
    cancelled_fpath(tmp_path, "123").touch()
    End(rank=0, attempt=0, outcome="done").write(end_fpath(tmp_path, "123", 0))
    (submitted,) = submit(Launcher(cluster="local", gpus_per_node=0), [cfg], tmp_path)
    assert not submitted.is_cancelled and not submitted.ends()


def test_more_gpus_than_the_shell_leaves_are_refused(tmp_path, inputs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    two = ["--cluster", "local", "--gpus-per-node", "2", "extract", *inputs, "--out", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="--gpus-per-node 2, but CUDA_VISIBLE_DEVICES=3 leaves 1"):
        run(two)
    for text, n in (("", 0), ("-1", 0), ("4, -1, 5", 1), (" 3,", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES={text} leaves {n}"):
            run(two)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3c,GPU-11aa")  # submitit would take the machine's first ones
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=GPU-8f3c,GPU-11aa names GPUs otherwise than by number"):
        run(two)


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (None, "pictures is not there, so nothing was launched"),
        (22, r"pictures: found 22 \(flat folder\) pictures; the shards have 23 examples"),
        (23, None),
    ],
)
def test_pictures_that_are_not_there_are_missed_before_the_extract(tmp_path, inputs, monkeypatch, n, said):
    images, launched = tmp_path / "pictures", []
    monkeypatch.setattr("slurm.launch.run_here", lambda cfg, logs: launched.append(cfg))
    if n is not None:
        images.mkdir()
        for i in range(n):
            (images / f"{i:02d}.png").touch()
    command = ["pipeline", *inputs, "--out", str(tmp_path / "run"), "--", "--images", str(images)]
    with nullcontext() if said is None else pytest.raises(SaevDistError, match=said):
        run(["--cluster", "debug", *command])
    assert len(launched) == (2 if said is None else 0) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--shards", "--sae", "--run"])
def test_what_is_not_there_is_not_launched(tmp_path, inputs, flag):
    there, nowhere = str(tmp_path / "run"), str(tmp_path / "nowhere")
    command = ["replay", "--run", nowhere] if flag == "--run" else ["extract", *inputs, "--out", there, flag, nowhere]
    if flag != "--run":
        del command[command.index(flag) : command.index(flag) + 2]
    with pytest.raises(ConfigError, match=r"nowhere(/metadata.json)? is not there, so nothing was launched"):
        run(["--cluster", "local", "--gpus-per-node", "0", *command])
    assert not (tmp_path / "run").exists() and not (tmp_path / "nowhere").exists()


def test_a_layer_that_the_shards_lack_is_not_launched(tmp_path, inputs):
    with pytest.raises(ConfigError, match="shards holds no layer 77; it holds 4"):
        run(["--cluster", "local", "--gpus-per-node", "0", "extract", *inputs, "--layer", "77", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_bad_input_is_one_line_and_no_gallery_follows(tmp_path, inputs, cluster):
    make_sae(Path(inputs[3]), d_model=8)
    done = launch("--cluster", cluster, "pipeline", *inputs, "--out", tmp_path / "run", "--", "--no-pictures")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "takes activations of width 8" in line and "Traceback" not in done.stdout and "replay" not in done.stdout


def test_debug_is_one_process_whatever_the_shell_is_and_a_bad_run_of_a_sweep_ends_no_other(
    tmp_path, inputs, monkeypatch, capsys
):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "23456")):
        monkeypatch.setenv(name, value)  # of torchrun's, whose other rank is not there
    shards, sae = inputs[1], Path(inputs[3])
    other = make_sae(tmp_path / "narrow.pt", d_model=8)
    flags = ["--shards", shards, "--sae", str(other), str(sae), *SETTINGS, "--out", str(tmp_path / "runs")]
    assert not run(["--cluster", "debug", "extract", *flags])
    assert "slurm.launch: error: " in (err := capsys.readouterr().err) and "takes activations of width 8" in err
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/manifest.json")] == ["sae"]


def test_debug_runs_here(tmp_path, inputs):
    done = launch(
        "--cluster", "debug", "--gpus-per-node", 2, "pipeline", *inputs, "--out", tmp_path / "run", "--", "--no-pictures"
    )
    assert done.returncode == 0 and "1 rank\n" in done.stdout
    assert "warning: --cluster debug takes no notice of --gpus-per-node.\n" in done.stderr
    assert (tmp_path / "run" / "visuals" / "index.html").exists()
