"""The launcher without a Slurm: its flags, its runs, jobs on this machine, and how it reads what became of a job."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import submitit

import slurm.launch
import slurm.progress
import slurm.watch
from saev_dist.config import Extract, Replay
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError, RunError, SaevDistError
from slurm.config import Launcher
from slurm.jobs import End, Job, cancelled_fpath, end_fpath, latest, launched, remember, tail
from slurm.launch import main, run, split
from slurm.progress import Kept, describe
from slurm.queue import State, ask
from slurm.submit import run_here, submit
from slurm.sweep import configs, is_finished
from slurm.watch import describe_state, follow, result, verdict
from tests.ranks import ENV, artifact_hashes, run_ranks
from tests.synthetic import make_acts, make_sae, make_shards

ROOT = Path(__file__).parent.parent
INPUTS = ["--shards", "s", "--sae", "a.pt", "--out", "o"]


@pytest.fixture
def args(tmp_path: Path) -> list[str]:
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    return ["--shards", str(shards), "--sae", str(sae), "--batch-tokens", "10", "--top-k", "4", "--no-progress"]


IN_THE_BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
"""What `launch … &` in a script does to SIGINT."""


def launch(*args: object, under: Sequence[str] = (), timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    command = [*under, sys.executable, "-m", "slurm.launch", *map(str, args)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=timeout_s)


# ---- what is to be run


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--nodes", "2", "extract", "--out", "o"], (["--nodes", "2"], "extract", ["--out", "o"])),
        (["--wait", "replay", "--run", "extract"], (["--wait"], "replay", ["--run", "extract"])),
        (["--partition", "extract", "pipeline"], (["--partition", "extract"], "pipeline", [])),
        (["--setup", "module load cuda", "status"], (["--setup", "module load cuda"], "status", [])),
        (["--partition=x", "cancel", "--run", "r"], (["--partition=x"], "cancel", ["--run", "r"])),
        (["--dry_run", "extract"], (["--dry_run"], "extract", [])),
        (["--help"], (["--help"], "", [])),
    ],
)
def test_the_command_parts_the_flags(argv, parts):
    assert split(argv) == parts


def test_a_missing_command_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--nodes", "2"])
    assert "a command is missing: one of extract, replay" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--cluster", "local", "extrct", "--shards", "s"])
    assert "a command is missing: did you mean 'extract'?" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--partition=gpu", "--gpus_per_node", "--wait", "--no-wait"])
@pytest.mark.parametrize("command", ["extract", "replay", "pipeline"])
def test_a_flag_of_the_launcher_after_the_command_is_sent_back(capsys, flag, command):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--out", "o", flag, "3"])
    assert f"{flag} is a flag of the launcher: write it before '{command}'." in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--no-pictures", "--n_images=3", "--images"])
def test_a_flag_of_replay_in_a_pipelines_extract_is_sent_to_the_end(capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        main(["pipeline", "--out", "o", flag, "--", "--n-features", "3"])
    assert f"{flag} is a flag of replay: write it at the end, behind a --." in capsys.readouterr().err


def test_what_a_flag_of_the_launcher_is_called_may_be_a_value(tmp_path, args, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--dry-run", "extract", *args, "--out", "nodes", "--no-progress"])
    assert "dry run: nothing was submitted" in capsys.readouterr().out


def test_a_preset_of_the_jobs_is_sent_to_the_job(tmp_path, capsys):
    (tmp_path / "extract.toml").write_text("top_k = 3")
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(tmp_path / "extract.toml"), "extract"])
    assert (
        "which launcher does not know; it is one of extract: write --config among the flags of that." in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", [[], ["extract"], ["status"]])
def test_help_is_the_jobs_own(command):
    done = launch(*command, "--help")
    expected = {"": "--gpus-per-node", "extract": "--rank-by", "status": "--lines"}["".join(command)]
    assert done.returncode == 0 and expected in done.stdout and "slurm.launch" in done.stdout


def test_one_input_is_one_run_with_paths_that_hold_anywhere():
    (cfg,) = configs(Extract, [*INPUTS, "--top-k", "7"])
    assert cfg == Extract(shards=Path("s").absolute(), sae=Path("a.pt").absolute(), out=Path("o").absolute(), top_k=7)


def test_several_inputs_are_runs_named_by_what_tells_them_apart():
    found = configs(Extract, ["--shards", "x/a/s", "x/b/s", "--sae", "1/sae.pt", "2/sae.pt", "--out", "o"])
    assert [cfg.out.relative_to(Path("o").absolute()).name for cfg in found] == ["a-1", "a-2", "b-1", "b-2"]
    assert {(cfg.shards.parent.name, cfg.sae.parent.name) for cfg in found} == {(s, a) for s in "ab" for a in "12"}
    assert [cfg.run.name for cfg in configs(Replay, ["--run-dir", "o/a", "o/b", "--n-features", "3"])] == ["a", "b"]


def test_a_repository_on_the_hub_stays_one():
    found = configs(Extract, ["--shards", "s", "--sae", "hf://owner/one", "hf://owner/two@v1", "b.pt", "--out", "o"])
    assert [cfg.sae for cfg in found] == [Path("hf:/owner/one"), Path("hf:/owner/two@v1"), Path("b.pt").absolute()]
    assert len({cfg.out for cfg in found}) == 3 and not any(is_finished(cfg) for cfg in found)


def test_a_toml_file_may_list_inputs_and_flags_override_them(tmp_path):
    fpath = tmp_path / "sweep.toml"
    fpath.write_text('shards = "s"\nsae = ["p/one.pt", "p/two.pt"]\nout = "o"\ntop_k = 9\n')
    found = configs(Extract, ["--config", str(fpath)])
    assert [(cfg.out.name, cfg.top_k) for cfg in found] == [("one", 9), ("two", 9)]
    (cfg,) = configs(Extract, ["--config", str(fpath), "--sae=three.pt"])
    assert cfg.sae.name == "three.pt"


def test_a_run_keeps_its_name_where_inputs_come_and_go(tmp_path, args):
    out, saes = tmp_path / "out", [tmp_path / name for name in ("p/one.pt", "p/two.pt", "q/one.pt")]
    for sae in saes:
        sae.parent.mkdir(exist_ok=True)
        shutil.copy(args[3], sae)
    flags = [*args[:2], *args[4:], "--out", str(out), "--sae", *map(str, saes[:2])]
    first, second = configs(Extract, flags)
    assert [first.out.name, second.out.name] == ["one", "two"]
    assert run_ranks("extract", *args, "--sae", saes[0], "--out", first.out).returncode == 0
    record = json.loads((first.out / "manifest.json").read_text())
    record["config"]["sae"] = str(saes[1])
    (second.out / "partials").mkdir(parents=True)
    (second.out / "partials/run.json").write_text(json.dumps(record))  # under way
    found = configs(Extract, [*flags, str(saes[2])])
    assert [cfg.out.name for cfg in found] == ["one", "two", "q-one"] and is_finished(found[0])
    record["config"]["sae"] = str(saes[2])
    found[2].out.mkdir()
    (found[2].out / "manifest.json").write_text(json.dumps(record))
    sibling = shutil.copy(args[3], tmp_path / "q/two.pt")
    alone = configs(Extract, [*args[:2], *args[4:], "--out", str(out), "--sae", str(saes[2]), str(sibling)])
    assert alone[0].out.name == "q-one", "one is another SAE's"
    others = configs(Extract, [*flags, str(saes[2]), "--top-k", "5"])
    assert [cfg.out.name for cfg in others] == ["p-one", "p-two", "q-one"], "other settings are another run"


@pytest.mark.parametrize("value", ["[]", '["a.pt", 3]', "3"])
def test_what_a_sweep_in_a_toml_file_may_be_is_said(tmp_path, value):
    fpath = tmp_path / "sweep.toml"
    fpath.write_text(f"sae = {value}")
    with pytest.raises(ConfigError, match=r"sae is .*; expected a path in quotes, or a list of them\.$"):
        configs(Extract, ["--config", str(fpath)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sae", "a.pt", "b.pt", "a.pt"], "--sae names a.pt twice"),
        (["--sae", "a-b.pt", "a/b.pt"], "would share a run directory"),
    ],
)
def test_inputs_that_cannot_be_told_apart_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        configs(Extract, ["--shards", "s", "--out", "o", *flags])


def test_only_this_very_run_counts_as_finished(tmp_path, args):
    out = tmp_path / "run"
    (cfg,) = configs(Extract, [*args, "--out", str(out)])
    assert not is_finished(cfg)
    assert run_ranks("extract", *args, "--out", out).returncode == 0
    assert is_finished(cfg) and is_finished(replace(cfg, read_ahead=9))
    for other in ({"top_k": 5}, {"layer": 3}, {"force": True}, {"pre_bias": True}, {"sae": tmp_path / "other.pt"}):
        assert not is_finished(replace(cfg, **other)), other
    os.utime(cfg.sae, (time.time() + 9,) * 2)  # trained again since
    assert not is_finished(cfg)
    assert not is_finished(replace(cfg, out=tmp_path / ("x" * 300)))  # that it cannot be, the job says


def test_another_mean_in_the_same_file_is_another_run(tmp_path, args):
    mean = tmp_path / "mean.npy"
    np.save(mean, np.zeros(Shards.open(Path(args[1])).d_model, np.float32))
    flags = [*args, "--input-mean", str(mean), "--out", str(tmp_path / "run")]
    (cfg,) = configs(Extract, flags)
    assert run_ranks("extract", *flags).returncode == 0
    assert is_finished(cfg)
    os.utime(mean, (time.time() + 9,) * 2)
    assert not is_finished(cfg)


@pytest.mark.parametrize("fpath", sorted((ROOT / "configs" / "slurm").glob("*.toml")), ids=lambda fpath: fpath.name)
def test_presets_are_defaults_that_flags_override(fpath, capsys, args, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["--config", str(fpath), "--dry-run", "--cpus-per-gpu", "3", "extract", *args, "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=3" in text and "#SBATCH --mem=" in text
    assert ("--gpus-per-node=8" in text) == ("cpu" not in fpath.name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"gpus_per_node": 2, "tasks_per_node": 3}, "a rank takes one GPU"),
        ({"time_h": 0.01}, "leaves nothing before --margin-s"),
        ({"time_h": math.inf}, "time_h must be a number of hours, got inf"),
        ({"time_h": math.nan}, "time_h must be a number of hours, got nan"),
        ({"mem_gb": 0.0}, "mem_gb must be a number above 0"),
        ({"mem_gb": math.inf}, "mem_gb must be a number above 0"),
        ({"slurm_args": ("--reservation=x",)}, "takes KEY=VALUE"),
        ({"cluster": "local", "nodes": 2}, "local is one node"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Launcher(**settings)


def test_a_dry_run_prints_plan_and_sbatch_file_and_needs_no_slurm(tmp_path, args, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    saes = [Path(args[3]), tmp_path / "x y.pt", tmp_path / "z.pt"]
    for fpath in saes[1:]:
        shutil.copy(saes[0], fpath)
    flags = ["--nodes", "3", "--gpus-per-node", "4", "--mem-gb", "1.5", "--time-h", "0.5", "--qos", "low", "--exclude", "n[1-2]",
             "--constraint", "h200&ib", "--margin-s", "60", "--signal", "USR1", "--max-requeues", "0", "--array-parallelism", "2",
             "--slurm-args", "comment=it's mine", "exclusive", "--setup", "module load cuda", "ulimit -l unlimited"]  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        main([*flags, "--dry-run", "pipeline", *args, "--sae", *map(str, saes), "--out", str(tmp_path / "it's")])
    out = capsys.readouterr().out
    assert out.count("batches on 12 rank(s)") == 3 and out.count("#!/bin/bash") == 2
    for line in ("array=0-2%2", "nodes=3", "gpus-per-node=4", "ntasks-per-node=4", "mem=1536M", "time=30", "qos=low", "exclude='n[1-2]'",
                 "constraint='h200&ib'", "no-requeue", "signal=USR1@60", "exclusive", "comment='it'\"'\"'s mine'"):  # fmt: skip
        assert out.count(f"#SBATCH --{line}\n") == 2, line
    assert out.count("#SBATCH --dependency=aftercorr:EXTRACT\n") == 1
    assert "\nmodule load cuda\nulimit -l unlimited\n" in out
    assert not (tmp_path / "it's").exists()


def test_a_dry_run_states_the_jobs_threads_and_memory_not_this_machines(tmp_path, args, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus = ["--gpus-per-node", "0", "--cpus-per-gpu", "7", "--tasks-per-node", "2", "--dry-run"]
    job = ["extract", *args, "--batch-tokens", "5", "--out", str(tmp_path / "run")]
    for flags, n_threads, warning in (
        ([], 7, ""),
        (["--mem-gb", "1e-4"], 1, "--mem-gb 0.0001 is less than the 2 rank(s) of a node"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main([*cpus, *flags, *job])
        done = capsys.readouterr()
        assert f"per rank, {n_threads} thread(s): " in done.out and warning in done.err and bool(done.err) == bool(warning)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(SystemExit, match="0"):
        main([*cpus, *job])
    done = capsys.readouterr()
    assert "per rank, 3 thread(s): " in done.out and "OMP_NUM_THREADS=3, of this shell or of --setup, will hold" in done.err
    for setup, n_threads in (("export OMP_NUM_THREADS=2", 2), ("unset OMP_NUM_THREADS", 7), ("echo $OMP_NUM_THREADS", 3)):
        assert Launcher(cpus_per_gpu=7, setup=(setup,)).n_threads == n_threads


def test_extracts_own_dry_run_submits_nothing_either(tmp_path, args, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["extract", *args, "--out", str(tmp_path / "run"), "--dry-run"])
    assert "nothing was submitted" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["50%", "a\\b", "a\nb"])
def test_names_that_slurm_would_read_otherwise_are_refused(tmp_path, args, name):
    with pytest.raises(ConfigError, match="choose other --logs"):
        run(["--dry-run", "extract", *args, "--out", str(tmp_path / name)])


def test_a_run_that_cannot_be_written_is_said_before_anything_is_submitted(tmp_path, args):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/run/slurm"):
        run(["--logs", str(tmp_path / "logs"), "extract", *args, "--out", str(tmp_path / "file" / "run")])


def test_where_there_is_no_slurm_it_says_so(tmp_path, args):
    done = subprocess.run(
        [sys.executable, "-m", "slurm.launch", "extract", *args, "--out", str(tmp_path / "run")],
        env=ENV | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("slurm.launch: error: cannot submit: ") and "--cluster local" in line


# ---- jobs on this machine


def test_local_ranks_have_the_bytes_of_one_process_and_the_gallery_follows(tmp_path, args):
    run = tmp_path / 'a "run" of it\'s own'
    done = launch(
        "--cluster", "local", "--gpus-per-node", 2, "--partition", "gpu", "--mem-gb", 9, "--setup", "true", "pipeline", *args,
        "--out", run, "--", "--no-pictures", "--n-features", 3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: --cluster local takes no notice of --partition, --mem-gb.\n" in done.stderr
    assert re.search(r"extract \d+ done.*tokens +115 of 23 images.*replay \d+ done.*gallery", done.stdout, re.S)
    assert [job.kind for job in launched(run)] == ["extract", "replay"]
    assert re.findall(r"^  (\w+) \d+  done$", launch("status", "--run", run).stdout, re.M) == ["extract", "replay"]
    (run / "slurm").rename(tmp_path / "logs")
    (run / "visuals").rename(tmp_path / "visuals")
    assert run_ranks("extract", *args, "--out", tmp_path / "alone").returncode == 0
    assert artifact_hashes(run) == artifact_hashes(tmp_path / "alone")


def test_a_local_job_that_is_told_to_leave_comes_back_and_has_the_same_bytes(tmp_path):
    shards, sae = make_shards(tmp_path / "shards", make_acts(3000), imgs_per_shard=1000), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 0.2, "--out"]
    run = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(launch, "--cluster", "local", "--gpus-per-node", 2, *args, run)
        while not list(run.glob("partials/*.partial")):
            assert not waiting.done(), waiting.result()
            time.sleep(0.02)
        (job,) = launched(run)
        lines = "\n".join(describe(job, is_running=True))
        os.kill(int(job.job_id), signal.SIGTERM)
        done = waiting.result()
    assert re.match(r"[\d.]+% of 3,000 batches are kept on the disk", lines), lines
    assert done.returncode == 0, done.stderr
    assert {(end.attempt, end.outcome) for end in job.ends()} == {(1, "done")}
    (run / "slurm").rename(tmp_path / "logs")
    assert run_ranks(*args, tmp_path / "alone").returncode == 0
    assert artifact_hashes(run) == artifact_hashes(tmp_path / "alone")


def test_a_local_job_has_the_gpus_of_its_shell_and_can_be_cancelled_behind_another(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "CUDA_VISIBLE_DEVICES", "5,7,8")
    shards, sae = make_shards(tmp_path / "shards", make_acts(60_000), imgs_per_shard=15_000), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 0.2, "--out"]
    out, show = tmp_path / "run", f"echo $CUDA_VISIBLE_DEVICES >{tmp_path}/gpus"
    flags = ["--cluster", "local", "--gpus-per-node", 2, "--setup", show, "--wait"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(launch, *flags, *args, out, under=IN_THE_BACKGROUND)
        while not list(out.glob("partials/*.partial")):
            assert not waiting.done(), waiting.result()
            time.sleep(0.02)
        assert run(["cancel", "--run", str(out)])
        done = waiting.result()
    assert done.returncode == 1 and re.search(r"^extract \d+ cancelled\. Launch it again", done.stderr, re.M)
    assert not (out / "manifest.json").exists() and (tmp_path / "gpus").read_text() == "5,7\n"


@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_an_interrupted_launcher_ends_its_local_job_in_order(tmp_path, whom):
    shards, sae = make_shards(tmp_path / "shards", make_acts(3000), imgs_per_shard=1000), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", shards, "--sae", sae, "--batch-tokens", 5, "--top-k", 4, "--snapshot-every", 600, "--out"]
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "slurm.launch",
        "--cluster",
        "local",
        "--gpus-per-node",
        0,
        "--tasks-per-node",
        2,
        *args,
        out,
    ]
    process = subprocess.Popen(
        [*map(str, command)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal, wherever the tests run
    )
    while len(list(out.glob("partials/*.bin"))) < 2:  # at work, and far from a snapshot
        assert process.poll() is None
        time.sleep(0.02)
    if whom == "all":  # as a terminal does
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert re.search(r"told to keep what is done and leave.*cancelled\. Launch it again.*no longer waiting", said, re.S), said
    (job,) = launched(out)
    assert list(out.glob("partials/*.partial"))
    deadline = time.monotonic() + 30  # its ranks have ended; the process that started them follows
    while os.path.exists(f"/proc/{job.job_id}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run_ranks(*args, out).returncode == 0


@pytest.mark.parametrize("setup", [[], ["--setup", "sleep 1"]], ids=["", "setup"])
def test_a_local_job_can_be_cancelled_before_it_is_at_work(tmp_path, args, setup):
    out = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(
            launch, "--cluster", "local", "--gpus-per-node", 0, "--tasks-per-node", 2, *setup, "extract", *args, "--out", out
        )
        while not (out / "slurm/jobs.jsonl").exists():
            assert not waiting.done(), waiting.result()
            time.sleep(0.01)
        while not launched(out):
            time.sleep(0.01)
        run(["cancel", "--run", str(out)])
        done = waiting.result()
    assert done.returncode == 1 and re.search(r"^extract \d+ cancelled\. Launch it again", done.stderr, re.M), done.stderr


def test_the_mark_of_an_earlier_job_of_that_number_is_forgotten(tmp_path, monkeypatch):
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path)
    job = SimpleNamespace(job_id="123", paths=SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(submitit.LocalExecutor, "submit_array", lambda *_: [job])
    cancelled_fpath(tmp_path, "123").touch()
    (submitted,) = submit(Launcher(cluster="local", gpus_per_node=0), [cfg], tmp_path)
    assert not submitted.is_cancelled


def test_more_gpus_than_the_shell_leaves_are_refused(tmp_path, args, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    two = ["--cluster", "local", "--gpus-per-node", "2", "extract", *args, "--out", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="--gpus-per-node 2, but CUDA_VISIBLE_DEVICES=3 leaves 1"):
        run(two)
    for text, n in (("", 0), ("-1", 0), ("4, -1, 5", 1), (" 3,", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES={text} leaves {n}"):
            run(two)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3c,GPU-11aa")  # submitit would take the machine's first ones
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=GPU-8f3c,GPU-11aa names GPUs otherwise than by number"):
        run(two)


def test_pictures_that_are_not_there_are_missed_before_the_extract(tmp_path, args):
    with pytest.raises(ConfigError, match="nowhere is not there, so nothing was launched"):
        run(
            [
                "--cluster",
                "debug",
                "pipeline",
                *args,
                "--out",
                str(tmp_path / "run"),
                "--",
                "--images",
                str(tmp_path / "nowhere"),
            ]
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--shards", "--sae", "--run"])
def test_what_is_not_there_is_not_launched(tmp_path, args, flag):
    there, nowhere = str(tmp_path / "run"), str(tmp_path / "nowhere")
    command = ["replay", "--run", nowhere] if flag == "--run" else ["extract", *args, "--out", there, flag, nowhere]
    if flag != "--run":
        del command[command.index(flag) : command.index(flag) + 2]
    with pytest.raises(ConfigError, match=r"nowhere(/metadata.json)? is not there, so nothing was launched"):
        run(["--cluster", "local", "--gpus-per-node", "0", *command])
    assert not (tmp_path / "run").exists() and not (tmp_path / "nowhere").exists()


def test_a_layer_that_the_shards_lack_is_not_launched(tmp_path, args):
    with pytest.raises(ConfigError, match="shards holds no layer 77; it holds 4"):
        run(["--cluster", "local", "--gpus-per-node", "0", "extract", *args, "--layer", "77", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_bad_input_is_one_line_and_no_gallery_follows(tmp_path, args, cluster):
    make_sae(Path(args[3]), d_model=8)
    done = launch("--cluster", cluster, "pipeline", *args, "--out", tmp_path / "run", "--", "--no-pictures")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "takes activations of width 8" in line and "Traceback" not in done.stdout and "replay" not in done.stdout


def test_debug_runs_here(tmp_path, args):
    done = launch(
        "--cluster", "debug", "--gpus-per-node", 2, "pipeline", *args, "--out", tmp_path / "run", "--", "--no-pictures"
    )
    assert done.returncode == 0 and "1 rank(s)" in done.stdout
    assert (tmp_path / "run" / "visuals" / "index.html").exists()


# ---- what became of a job


def test_the_result_holds_what_was_warned_of_once(job):
    job.folder.mkdir(parents=True, exist_ok=True)
    warning = "saev-dist: warning: on 512 tokens"
    bar = "extract  50.0%  1/2 tokens"
    lines = ["submitit INFO", warning, *[bar] * 3000, warning, bar, "tokens  2", "L0      1"]
    job.log_fpath(0).write_text("\n".join(lines))
    assert result(job) == [warning, "tokens  2", "L0      1"]


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


def test_logs_that_cannot_be_made_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/logs: cannot write: Not a directory"):
        run_here(Extract(shards=tmp_path, sae=tmp_path, out=tmp_path / "run"), tmp_path / "file/logs")


def test_success_is_the_word_of_all_ranks_whatever_slurm_remembers(job):
    ended(job, *(End(rank=rank, attempt=1, outcome="done") for rank in (0, 1)))
    assert verdict(job, State(name="FORGOTTEN"))[0] and verdict(job, State(name="COMPLETED"))[0]


def test_slurm_may_know_of_a_success_before_the_ranks_words_are_seen(job):
    assert verdict(job, State(name="COMPLETED"))[0] and not verdict(job, State(name="FAILED"))[0]


@pytest.mark.parametrize("outcome", ["done", "left", "failed"])
def test_words_of_an_earlier_attempt_are_not_taken_for_the_outcome(job, outcome):
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
    assert describe_state(job, waiting) == "waits in the queue: BeginTime, requeued 1 time"
    assert describe_state(job, running) == "running on n1, requeued 2 times"


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
    assert "left no word" in capsys.readouterr().err


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
        return SimpleNamespace(owner=owner, segments=[SimpleNamespace(first=first, stop=stop, owner=owner)])

    old, new = header(0, "aa", 0, 400), header(1, "bb", 400, 500)
    text = Kept(1000, [(old, 5000.0), (new, 100.0)], attempt_s=200.0).text()
    assert text.startswith("50.0% of 1,000 batches are kept") and "ETA 0:06:40" in text  # 1 batch/s; 100 done since
    assert "no snapshot of this attempt yet" in Kept(1000, [(old, 5000.0)], attempt_s=200.0).text()


def test_a_partial_that_has_just_been_replaced_counts_as_an_earlier_attempts(tmp_path):
    (tmp_path / "there").touch()
    assert slurm.progress._age_s(tmp_path / "there", time.time() + 5) == pytest.approx(5, abs=2)
    assert slurm.progress._age_s(tmp_path / "gone", time.time()) == math.inf


def test_a_run_that_nobody_launched_is_said(tmp_path, capsys):
    for command in ("status", "cancel"):
        with pytest.raises(SystemExit, match="1"):
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


def test_a_damaged_list_of_jobs_is_named(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.jsonl").write_text("{}\n")
    with pytest.raises(SaevDistError, match=r"jobs\.jsonl is damaged"):
        launched(tmp_path)
