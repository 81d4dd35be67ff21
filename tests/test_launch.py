"""The launcher without a Slurm: its flags, the runs that they name, and what it would submit."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saev_dist.config import Extract, Replay
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError, RunError, count
from slurm.config import Launcher
from slurm.hold import HELD
from slurm.launch import main, run, split
from slurm.submit import RANK, _brief, run_here
from slurm.sweep import configs, is_finished
from tests.ranks import ENV, launch, run_ranks
from tests.replays import make_run
from tests.synthetic import make_sae

ROOT = Path(__file__).parent.parent
INPUTS = ["--shards", "s", "--sae", "a.pt", "--out", "o"]


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
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["--nodes", "2"])
    assert "a command is missing: one of extract, replay" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["--cluster", "local", "extrct", "--shards", "s"])
    assert "'extrct' is no command: did you mean 'extract'?" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--partition=gpu", "--gpus_per_node", "--wait", "--no-wait"])
@pytest.mark.parametrize("command", ["extract", "replay", "pipeline"])
def test_a_flag_of_the_launcher_after_the_command_is_sent_back(capsys, flag, command):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([command, "--out", "o", flag, "3"])
    assert f"{flag} is a flag of the launcher: write it before '{command}'." in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--no-pictures", "--n_images=3", "--images"])
def test_a_flag_of_replay_in_a_pipelines_extract_is_sent_to_the_end(capsys, flag):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["pipeline", "--out", "o", flag, "--", "--n-features", "3"])
    assert f"{flag} is a flag of replay: write it at the end, behind a --." in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--run", "--run-dir=r", "--run_dir"])
def test_the_run_of_a_pipelines_replay_is_not_to_be_said(capsys, flag):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["pipeline", "--out", "o", "--", "--n-features", "3", flag, "r"])
    assert f"{flag} is not for a pipeline, whose replay draws what its extract writes: leave it out." in capsys.readouterr().err


def test_what_a_flag_of_the_launcher_is_called_may_be_a_value(tmp_path, inputs, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--dry-run", "extract", *inputs, "--out", "nodes", "--no-progress"])
    assert "dry run: nothing was submitted" in capsys.readouterr().out


def test_a_preset_of_the_jobs_is_sent_to_the_job(tmp_path, capsys):
    (tmp_path / "extract.toml").write_text("top_k = 3")
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["--config", str(tmp_path / "extract.toml"), "extract"])
    assert (
        "which launcher does not know; it is one of extract: write --config among the flags of that." in capsys.readouterr().err
    )


def test_a_refused_job_leaves_nothing(tmp_path, inputs, monkeypatch):
    for name, text in (("srun", "exit 0"), ("sbatch", "echo sbatch: error: invalid partition specified: gpu >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="Slurm refuses the extract job: invalid partition specified: gpu"):
        run(["extract", *inputs, "--out", str(tmp_path / "runs/a")])
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "runs/slurm").mkdir(parents=True)
    (tmp_path / "runs/slurm/1_0_log.out").touch()
    (tmp_path / "sbatch").write_text(
        f"#!/bin/sh\ntouch {tmp_path}/runs/slurm/1_1_log.out; exit 1\n"
    )  # another job's, meanwhile
    with pytest.raises(ConfigError):
        run(["extract", *inputs[:2], "--sae", inputs[3], str(make_sae(tmp_path / "b.pt")), "--out", str(tmp_path / "runs")])
    assert {path.name for path in (tmp_path / "runs").rglob("*")} == {"slurm", "1_0_log.out", "1_1_log.out"}


BY_HAND = "from saev_dist.signals import Signals\nwith Signals(1) as caught: print(caught.received)"
LAUNCHED = """
from pathlib import Path; from saev_dist.config import Replay; from slurm.jobs import End; from slurm.task import Task
end = Task(cfg=Replay(run=Path("r")), n_threads=1, max_requeues=0)._run(End(rank=0, attempt=0, outcome="done"), None)
print(end.error if end.outcome == "left" else end)"""


@pytest.mark.parametrize(("code", "number"), [*((BY_HAND, number) for number in HELD), (LAUNCHED, HELD[-1])])
def test_a_signal_that_comes_before_a_rank_can_obey_it_waits(code, number):
    early = f"import os; os.kill(os.getpid(), {int(number)}); "
    command = [*shlex.split(RANK), "-c", early + code.lstrip()]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{number.name}\n", "")


@pytest.mark.parametrize("command", [[], ["extract"], ["status"]])
def test_help_is_the_jobs_own(command):
    done = launch(*command, "--help")
    expected = {"": "--gpus-per-node", "extract": "--rank-by", "status": "--lines"}["".join(command)]
    assert done.returncode == 0 and expected in done.stdout and "slurm.launch" in done.stdout


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_may_follow_a_list_of_inputs(capsys, flag):
    with pytest.raises(SystemExit, match=r"^0$"):
        configs(Extract, [*INPUTS, "--sae", "a.pt", flag])
    assert "--rank-by" in capsys.readouterr().out


def test_one_input_is_one_run_with_paths_that_hold_anywhere():
    (cfg,) = configs(Extract, [*INPUTS, "--top-k", "7"])
    assert cfg == Extract(shards=Path("s").absolute(), sae=Path("a.pt").absolute(), out=Path("o").absolute(), top_k=7)


def test_inputs_may_begin_with_a_dash_and_no_name_leads_out_of_the_sweeps_directory():
    (cfg,) = configs(Extract, ["--shards=-s", "--sae=-a.pt", "--out", "o"])
    assert (cfg.shards, cfg.sae) == (Path("-s").absolute(), Path("-a.pt").absolute())
    out = Path("o").absolute()
    for saes in (["..", "../x"], ["/", "/x"], ["a/..", "b/../c"]):
        runs = [cfg.out for cfg in configs(Extract, ["--shards", "s", "--sae", *saes, "--out", "o"])]
        assert len(set(runs)) == 2 and all(path.parent == out and path.name not in ("", "..") for path in runs), runs


def test_several_inputs_are_runs_named_by_what_tells_them_apart():
    found = configs(Extract, ["--shards", "x/a/s", "x/b/s", "--sae", "1/sae.pt", "2/sae.pt", "--out", "o"])
    assert [cfg.out.relative_to(Path("o").absolute()).name for cfg in found] == ["a-1", "a-2", "b-1", "b-2"]
    assert {(cfg.shards.parent.name, cfg.sae.parent.name) for cfg in found} == {(s, a) for s in "ab" for a in "12"}
    for flag in ("--run-dir", "--run_dir"):
        assert [cfg.run.name for cfg in configs(Replay, [flag, "o/a", "o/b", "--n-features", "3"])] == ["a", "b"]


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


def test_a_run_keeps_its_name_where_inputs_come_and_go(tmp_path, inputs):
    out, saes = tmp_path / "out", [tmp_path / name for name in ("p/one.pt", "p/two.pt", "q/one.pt")]
    for sae in saes:
        sae.parent.mkdir(exist_ok=True)
        shutil.copy(inputs[3], sae)
    flags = [*inputs[:2], *inputs[4:], "--out", str(out), "--sae", *map(str, saes[:2])]
    first, second = configs(Extract, flags)
    assert [first.out.name, second.out.name] == ["one", "two"]
    assert run_ranks("extract", *inputs, "--sae", saes[0], "--out", first.out).returncode == 0
    record = json.loads((first.out / "manifest.json").read_text())
    record["config"]["sae"] = str(saes[1])
    (second.out / "partials").mkdir(parents=True)
    (second.out / "partials/run.json").write_text(json.dumps(record))  # under way
    found = configs(Extract, [*flags, str(saes[2])])
    assert [cfg.out.name for cfg in found] == ["one", "two", "q-one"] and is_finished(found[0])
    (first.out / "img_acts.npz").unlink()
    with pytest.raises(RunError, match=r"one/img_acts.npz: No such file or directory; run extract again with --force."):
        is_finished(found[0])
    manifest = json.loads((first.out / "manifest.json").read_text())
    for listed in (None, [1], {"a\0b": 1}, {"../sae.pt": 3}, {"top_values.pt": "x"}):
        (first.out / "manifest.json").write_text(json.dumps(manifest | {"artifacts": listed}))
        with pytest.raises(RunError, match=r"manifest.json.*artifacts"):
            is_finished(found[0])
    record["config"]["sae"] = str(saes[2])
    found[2].out.mkdir()
    (found[2].out / "manifest.json").write_text(json.dumps(record))
    sibling = shutil.copy(inputs[3], tmp_path / "q/two.pt")
    alone = configs(Extract, [*inputs[:2], *inputs[4:], "--out", str(out), "--sae", str(saes[2]), str(sibling)])
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


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--setup", ["--setup", "module load a", "--partition", "p", "--setup=module load b", "extract", *INPUTS]),
        ("--slurm-args", ["--slurm-args=--qos=a", "--slurm_args=--nice", "extract", *INPUTS]),
        ("--sae", ["extract", *INPUTS, "--sae", "b.pt"]),
        ("--run", ["replay", "--run", "a", "--run-dir", "b"]),
        ("--features", ["pipeline", *INPUTS, "--", "--features", "3", "--features", "5"]),
        ("--run", ["status", "--run", "a", "--run", "b"]),
        ("--run", ["cancel", "--run=a", "--run-dir=b"]),
    ],
)
def test_a_flag_of_several_values_is_given_once(flag, words):
    with pytest.raises(ConfigError, match=f"^{flag} is given twice, and only the last would count; write it once: {flag} A B"):
        run(words)


@pytest.mark.parametrize("words", [["--setup", "a", "--setup", "b", "--help"], ["status", "--run", "a", "--run", "b", "-h"]])
def test_help_comes_before_what_is_wrong_with_flags(words, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        run(words)
    assert "usage: " in capsys.readouterr().out


def test_only_this_very_run_counts_as_finished(tmp_path, inputs):
    out = tmp_path / "run"
    (cfg,) = configs(Extract, [*inputs, "--out", str(out)])
    assert not is_finished(cfg)
    assert run_ranks("extract", *inputs, "--out", out).returncode == 0
    assert is_finished(cfg) and is_finished(replace(cfg, read_ahead=9))
    for other in ({"top_k": 5}, {"layer": 3}, {"force": True}, {"pre_bias": True}, {"sae": tmp_path / "other.pt"}):
        assert not is_finished(replace(cfg, **other)), other
    os.utime(cfg.sae, (time.time() + 9,) * 2)  # trained again since
    assert not is_finished(cfg)
    assert not is_finished(replace(cfg, out=tmp_path / ("x" * 300)))  # that it cannot be, the job says


def test_a_directory_trained_again_is_another_run(tmp_path, inputs):
    sae = tmp_path / "lens"
    sae.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (sae / name).touch()
    flags = [*inputs, "--out", str(tmp_path / "run")]
    assert run_ranks("extract", *flags).returncode == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    manifest["config"]["sae"] = str(sae)  # which an extract needs more of than this does
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    flags[flags.index("--sae") + 1] = str(sae)
    (cfg,) = configs(Extract, flags)
    assert is_finished(cfg)
    os.utime(sae / "sae_weights.safetensors", (time.time() + 9,) * 2)
    assert not is_finished(cfg)
    shutil.rmtree(sae)
    assert not is_finished(cfg)


def test_another_mean_in_the_same_file_is_another_run(tmp_path, inputs):
    mean = tmp_path / "mean.npy"
    np.save(mean, np.zeros(Shards.open(Path(inputs[1])).d_model, np.float32))
    flags = [*inputs, "--input-mean", str(mean), "--out", str(tmp_path / "run")]
    (cfg,) = configs(Extract, flags)
    assert run_ranks("extract", *flags).returncode == 0
    assert is_finished(cfg)
    os.utime(mean, (time.time() + 9,) * 2)
    assert not is_finished(cfg)


@pytest.mark.parametrize("fpath", sorted((ROOT / "configs" / "slurm").glob("*.toml")), ids=lambda fpath: fpath.name)
def test_presets_are_defaults_that_flags_override(fpath, capsys, inputs, tmp_path):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--config", str(fpath), "--dry-run", "--cpus-per-gpu", "3", "extract", *inputs, "--out", str(tmp_path / "run")])
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


def test_a_dry_run_prints_plan_and_sbatch_file_and_needs_no_slurm(tmp_path, inputs, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    saes = [Path(inputs[3]), tmp_path / "x y.pt", tmp_path / "z.pt"]
    for fpath in saes[1:]:
        shutil.copy(saes[0], fpath)
    flags = ["--nodes", "3", "--gpus-per-node", "4", "--mem-gb", "1.5", "--time-h", "0.5", "--qos", "low", "--exclude", "n[1-2]",
             "--constraint", "h200&ib", "--margin-s", "60", "--signal", "USR1", "--max-requeues", "0", "--array-parallelism", "2",
             "--slurm-args", "comment=it's mine", "exclusive", "--setup", "module load cuda", "ulimit -l unlimited"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*flags, "--dry-run", "pipeline", *inputs[:3], *map(str, saes), *inputs[4:], "--out", str(tmp_path / "it's")])
    out = capsys.readouterr().out
    assert out.count("batches on 12 ranks") == 3 and out.count("#!/bin/bash") == 2
    for line in ("array=0-2%2", "nodes=3", "gpus-per-node=4", "ntasks-per-node=4", "mem=1536M", "time=30", "qos=low", "exclude='n[1-2]'",
                 "constraint='h200&ib'", "no-requeue", "signal=USR1@60", "exclusive", "comment='it'\"'\"'s mine'"):  # fmt: skip
        assert out.count(f"#SBATCH --{line}\n") == 2, line
    assert out.count("#SBATCH --dependency=aftercorr:EXTRACT\n") == 1
    assert "\nmodule load cuda\nulimit -l unlimited\n" in out
    assert not (tmp_path / "it's").exists()


def test_a_dry_run_states_the_jobs_threads_and_memory_not_this_machines(tmp_path, inputs, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus = ["--gpus-per-node", "0", "--cpus-per-gpu", "7", "--tasks-per-node", "2", "--dry-run"]
    job = ["extract", *inputs, "--batch-tokens", "5", "--out", str(tmp_path / "run")]
    for flags, n_threads, warning in (
        ([], 7, ""),
        (["--mem-gb", "1e-4"], 1, "--mem-gb 0.0001 is less than the 2 ranks of a node"),
    ):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*cpus, *flags, *job])
        done = capsys.readouterr()
        assert (
            f"per rank, {count(n_threads, 'thread')}: " in done.out and warning in done.err and bool(done.err) == bool(warning)
        )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*cpus, *job])
    done = capsys.readouterr()
    assert "per rank, 3 threads: " in done.out and "OMP_NUM_THREADS=3, of this shell or of --setup, will hold" in done.err
    for setup, n_threads in (("export OMP_NUM_THREADS=2", 2), ("unset OMP_NUM_THREADS", 7), ("echo $OMP_NUM_THREADS", 3)):
        assert Launcher(cpus_per_gpu=7, setup=(setup,)).n_threads == n_threads


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("cluster", ["slurm", "local", "debug"])
def test_a_dry_run_plans_for_the_gpu_that_the_job_will_find(tmp_path, inputs, capsys, monkeypatch, cluster, has_gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--cluster", cluster, "--dry-run", "extract", *inputs, "--out", str(tmp_path / "run")])
    found = re.search(r"^device +(.*)$", capsys.readouterr().out, re.M)[1]
    assert (found == "none: the encoder runs on the CPU") == (cluster != "slurm" and not has_gpu)
    if cluster != "slurm" and not has_gpu:
        flags = ["--cluster", cluster, "--dry-run", "extract", *inputs, "--device", "cuda", "--out", str(tmp_path / "run")]
        with pytest.raises(ConfigError, match="--device cuda, but torch sees no GPU here"):
            run(flags)


def test_extracts_own_dry_run_submits_nothing_either(tmp_path, inputs, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["extract", *inputs, "--out", str(tmp_path / "run"), "--dry-run"])
    text = capsys.readouterr().out
    assert "nothing was submitted" in text and not (tmp_path / "run").exists()
    assert "\nexport SLURM_EXPORT_ENV=ALL\n" in text and " -I -S " in text and "slurm/hold.py " in text


def test_a_dry_run_of_a_replay_says_what_it_would_draw(tmp_path, capsys):
    out = make_run(tmp_path)
    capsys.readouterr()
    for flags in (["--dry-run", "replay"], ["replay", "--dry-run"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*flags, "--run", str(out), "--n-features", "2", "--no-pictures"])
        text = capsys.readouterr().out
        assert f"{out}\nfeatures  2 of 24\n" in text and "#SBATCH --job-name=saev-replay\n" in text
        assert "nothing was submitted" in text and not (out / "slurm").exists()


@pytest.mark.parametrize("name", ["50%", "a\\b", "a\nb"])
def test_names_that_slurm_would_read_otherwise_are_refused(tmp_path, inputs, name):
    with pytest.raises(ConfigError, match="choose other --logs"):
        run(["--dry-run", "extract", *inputs, "--out", str(tmp_path / name)])


def test_a_run_that_cannot_be_written_is_said_before_anything_is_submitted(tmp_path, inputs):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/run/slurm"):
        run(["--logs", str(tmp_path / "logs"), "extract", *inputs, "--out", str(tmp_path / "file" / "run")])


def test_where_there_is_no_slurm_it_says_so(tmp_path, inputs):
    done = subprocess.run(
        [sys.executable, "-m", "slurm.launch", "extract", *inputs, "--out", str(tmp_path / "run")],
        env=ENV | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("slurm.launch: error: cannot submit: ") and "--cluster local" in line


def test_logs_that_cannot_be_made_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/logs: cannot write: Not a directory"):
        run_here(Extract(shards=tmp_path, sae=tmp_path, out=tmp_path / "run"), tmp_path / "file/logs")


@pytest.mark.parametrize(("complaint", "said"), [("", "sbatch failed, and said nothing."), ("\n \n", "sbatch failed, and said nothing."), ("sbatch: error: no\n", "no.")])  # fmt: skip
def test_whatever_sbatch_complains_of_is_one_line(complaint, said):
    assert _brief(complaint) == said
