"""Killed, stopped or started twice: what a run does then, and what the next attempt makes of it."""

import json
import os
import re
import signal
import sys

import pytest
import torch

from saev_dist import partials
from saev_dist.identity import contrast
from saev_dist.plan import Plan
from saev_dist.sae.product import arithmetic
from saev_dist.spill import covered
from tests.crash import N_BATCHES, STOPPING, Fault, killed, unfinished, wait_for
from tests.ranks import artifact_hashes, leading_a_group
from tests.soak import Soak
from tests.synthetic import N_IMGS, N_PATCHES, TOPK, make_sae

# ---- killed and resumed


def test_one_five_and_two_ranks_do_each_their_part(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    killed(server, args, out, at=4)  # run.json and two partials
    killed(server, args, out, at=2, n_ranks=5, rank=1)
    done = covered(segment for partial in partials.newest(out / "partials") for segment in partial.segments)
    n_done = Plan([7, 7, 7, 2], 2).n_examples_in(done) * N_PATCHES
    codes, output = server.run(*args, out, n_ranks=2)
    assert codes == [0, 0], output
    assert artifact_hashes(out) == expected
    ranks = json.loads((out / "manifest.json").read_text())["ranks"]
    assert sum(rank["n_tokens_before"] for rank in ranks) == n_done > 20, "what was done is not done again"
    assert sum(rank["n_tokens_before"] + rank["n_tokens"] for rank in ranks) == N_IMGS * N_PATCHES
    assert "tokens were done before" in output
    assert (
        f"{out} holds {n_done // N_PATCHES} of {N_IMGS} images ({n_done / N_PATCHES / N_IMGS:.1%}) of this run: going on."
        in output
    )


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_runs_killed_at_random_end_in_the_same_bytes(soak, seed):
    soak.trial(seed)


@pytest.fixture(scope="module")
def soak(tmp_path_factory, server):
    return Soak(tmp_path_factory.mktemp("soak"), server)


def test_a_restart_by_torchrun_continues_by_itself(tmp_path, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    job = "import os\nfrom saev_dist.cli import main\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == os.environ['RANK'] == '0':"
    job += STOPPING.replace("\n", "\n    ") + f"\nmain({[*map(str, args), str(out)]!r})"
    (tmp_path / "job.py").write_text(job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    with leading_a_group([*command, tmp_path / "job.py"]) as process:
        wait_for(lambda: list(out.glob("partials/00000-*.partial")))
        os.kill(int(re.match(r"process (\d+) ", (out / "partials/lock").read_text())[1]), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert "tokens were done before" in stdout
    assert artifact_hashes(out) == expected


def test_force_starts_over_but_not_in_a_restart_of_the_same_job(tmp_path, server, whole):
    args, expected, _ = whole
    killed(server, args, tmp_path / "a", at=5)
    codes, output = server.run(*args, tmp_path / "a", "--force")
    assert codes == [0] and "done before" not in output
    killed(server, args, tmp_path / "b", at=5)
    restarted = "import os; os.environ['SLURM_RESTART_COUNT'] = '1'; "
    codes, output = server.run(*args, tmp_path / "b", "--force", before=restarted)
    assert codes == [0] and "done before" in output
    assert artifact_hashes(tmp_path / "a") == artifact_hashes(tmp_path / "b") == expected
    killed(server, args, tmp_path / "c", at=5)
    run_fpath = tmp_path / "c/partials/run.json"
    fault = Fault(ops="o", at=1, how="5", forever=True)
    codes, output = server.run(*args, tmp_path / "c", "--force", before=restarted, fault=fault, roots=(run_fpath,))
    assert codes == [1] and "run.json: cannot read: Input/output error" in output, output
    codes, output = server.run(*args, tmp_path / "c", "--force", before=restarted)
    assert codes == [0] and "done before" in output, output
    os.truncate(tmp_path / "b/manifest.json", 100)
    codes, output = server.run(*args, tmp_path / "b", "--force", before=restarted)
    assert codes == [0], output
    assert artifact_hashes(tmp_path / "b") == expected


def test_force_computes_nothing_again_when_the_job_is_restarted_after_its_end(tmp_path, server, whole):
    """A rank may die between the last rename and its exit; a job of another id is asked for a new computation."""
    args, expected, _ = whole
    out = tmp_path / "run"
    assert server.run(*args, out)[0] == [0]
    slurm = "import os; os.environ |= {{'SLURM_JOB_ID': '{}', 'SLURM_RESTART_COUNT': '{}'}}"
    torchrun = "import os; os.environ |= {{'TORCHELASTIC_RUN_ID': 'none', 'TORCHELASTIC_RESTART_COUNT': '{1}'}}; {0}"
    other_agent = "os.getppid = lambda: 1"
    for before, job_id, n_restarts, is_done in (
        (slurm, "7", 0, False), (slurm, "7", 1, True), (slurm, "7", 0, False), (slurm, "8", 1, False),
        (torchrun, "", 0, False), (torchrun, "", 1, True), (torchrun, other_agent, 1, False),
    ):  # fmt: skip
        codes, output = server.run(*args, out, "--force", before=before.format(job_id, n_restarts))
        assert codes == [0] and ("nothing to do" in output) == is_done, (before, job_id, n_restarts, output)
        assert artifact_hashes(out) == expected


def test_forcing_keeps_the_finished_artifacts_until_the_new_ones_are_there(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    assert server.run(*args, out)[0] == [0]
    killed(server, [*args[:-1], "--force", "--percentile", 50, "--out"], out, at=5)
    before = {path.name for path in out.iterdir()}
    assert before == {*expected, "manifest.json", "partials"}
    codes, output = server.run(*args, out)
    assert codes == [1] and "holds an unfinished run with other settings (percentile: there 50.0, here 99.0)" in output
    codes, output = server.run(*args[:-1], "--percentile", 50, "--out", out)
    assert codes == [0] and "done before" in output


def test_saevs_percentile_resumes(tmp_path, server, whole):
    args = [*whole[0][:-1], "--percentile-estimator", "saev", "--out"]
    codes, output = server.run(*args, tmp_path / "run", "--skip-bad-shards")  # it needs all tokens
    assert codes == [1] and "it does not go with --skip-bad-shards" in output
    assert server.run(*args, tmp_path / "a")[0] == [0]
    killed(server, args, tmp_path / "b", at=6)
    codes, output = server.run(*args, tmp_path / "b", n_ranks=2)
    assert codes == [1, 1] and "depends on the order of all tokens, so it runs in one process; there are 2" in output
    codes, output = server.run(*args, tmp_path / "b")
    assert codes == [0] and "done before" in output
    assert artifact_hashes(tmp_path / "a") == artifact_hashes(tmp_path / "b") != whole[1]
    (fpath,) = (tmp_path / "b").glob("percentiles_*.pt")
    assert 0 < float(torch.load(fpath, weights_only=True).max()) < 1  # on its way


@pytest.mark.parametrize(
    ("flags", "difference"),
    [(["--top-k", 5], "top_k: there 4, here 5"), (["--no-img-acts"], "img_acts: there true, here false")],
)
def test_other_settings_are_refused_by_name(tmp_path, server, whole, flags, difference):
    args, expected, _ = whole
    killed(server, args, tmp_path / "run", at=4)
    codes, output = server.run(*args, tmp_path / "run", *flags)
    assert codes == [1] and output.count("\n") == 1 and difference in output
    assert server.run(*args, tmp_path / "run")[0] == [0]
    assert artifact_hashes(tmp_path / "run") == expected


NAMES = r'statistics: there a list of \d with "[a-z]+\.\w+", here a list of 1[);]'
"""What a line says where another version kept more."""


def test_what_a_version_with_other_statistics_kept_is_told_by_their_names(tmp_path, server, whole):
    args, expected, _ = whole
    out, other = tmp_path / "run", "import saev_dist.job as j; j.state_names = lambda *_: ['moments.count_s']"
    killed(server, args, out, at=4)
    codes, output = server.run(*args, out, before=other)
    assert codes == [1] and output.count("\n") == 1 and re.search(NAMES, output), output
    assert server.run(*args, out)[0] == [0] and artifact_hashes(out) == expected
    codes, output = server.run(*args, out, before=other)
    assert codes == [1] and re.search(NAMES, output), output


ELSEWHERE = """
import os
from pathlib import Path
from saev_dist import job
load = job.load_sae
job.load_sae = lambda path, overrides: load(Path("{}") if os.environ["RANK"] == "1" else path, overrides)
"""
"""Code for `before`: rank 1 finds another SAE under the same name."""


def test_ranks_that_see_other_files_are_refused(tmp_path, server, whole):
    args, _, _ = whole
    other = make_sae(tmp_path / "other.pt", seed=5)
    codes, output = server.run(*args, tmp_path / "run", n_ranks=2, before=ELSEWHERE.format(other))
    assert codes == [1, 1]
    assert re.search(
        r"error: rank 1: it would compute something else than rank 0: sae_sha256 is \S+ here, \S+ there", output
    ), output
    assert output.count("error: ") == 1 and not (tmp_path / "run").exists()


def test_what_was_computed_in_unlike_ways_is_told_of(tmp_path, server, whole):
    args, expected, _ = whole
    elsewhere = "import os, saev_dist.extract as e\ne.arithmetic = lambda *_, **__: 'GPU ' + os.environ.get('RANK', '0')"
    codes, output = server.run(*args, tmp_path / "ranks", n_ranks=2, before=elsewhere)
    assert codes == [0, 0] and output.count("warning: ") == 1, output
    assert "warning: rank 0: this run is computed on GPU 0 and on GPU 1, which may differ in" in output
    here = arithmetic(torch.device("cpu"), "fp32", screen=False)
    for name, at, kinds in (("begun", 2, ["GPU 0"]), ("amid", 4, sorted([here, "GPU 0"])), ("all", 4 + N_BATCHES, [here])):
        killed(server, args, tmp_path / name, at=at)  # before the first partial, after the second, after the last
        killed(server, args, tmp_path / name, at=1, ops="f")  # an attempt that changes nothing
        codes, output = server.run(*args, tmp_path / name, before=elsewhere)
        said = re.findall("warning: this run is computed on (.*), which", output)
        assert codes == [0] and said == ([" and on ".join(kinds)] if len(kinds) > 1 else []), output
        assert json.loads((tmp_path / name / "manifest.json").read_text())["ranks"][0]["arithmetic"] == kinds
        assert artifact_hashes(tmp_path / name) == expected


def test_of_two_lists_the_entries_that_differ_are_named():
    assert contrast(["a", "b", None, "c"], ["a", None, "b", "d"]) == ('[3] "c"', '[3] "d"')
    assert contrast(["a"], ["a", "b", "c"]) == ("a list of 1", 'a list of 3 with "b"')
    assert contrast("x" * 99, None) == (f'"{"x" * 16}…', "null")


def test_another_sae_is_refused(tmp_path, server, whole):
    args, _, _ = whole
    killed(server, args, tmp_path / "run", at=4)
    other = make_sae(tmp_path / "other.pt", TOPK)
    codes, output = server.run(*args, tmp_path / "run", "--sae", other)
    assert codes == [1] and "sae_sha256: there" in output


def test_the_self_check_is_made_once_a_run_and_every_attempt_tells_its_finding(tmp_path, server, whole):
    *args, out_flag = whole[0]
    args = [*args, "--self-check", "warn", out_flag]
    looking = "import saev_dist.selfcheck as s\nf = s.examine\n"
    looking += "s.examine = lambda *a, **k: (print('looked', flush=True), f(*a, **k))[1]"
    for name, way in (("resumed", args), ("merged", ["merge", "--run"])):
        out = tmp_path / name
        killed(server, args, out, at=1 + N_BATCHES + 3)  # among the artifacts
        codes, output = server.run(*way, out, before=looking)
        assert codes == [0] and "looked" not in output, output
        report = json.loads((out / "manifest.json").read_text())["self_check"]
        assert report["n_tokens"] > 0 and report["finding"]
        assert (f"saev-dist: warning: {report['finding']}" in output) == (name == "resumed"), output
    killed(server, args, tmp_path / "strict", at=4)
    codes, output = server.run(*args[:-1], "--self-check", "strict", out_flag, tmp_path / "strict", before=looking)
    assert codes == [1] and "looked" not in output and "(--self-check warn goes on.)" in output, output
    codes, output = server.run(*args, tmp_path / "strict", "--force", before=looking)
    assert codes == [0] and "looked" in output, output
    killed(server, whole[0], tmp_path / "off", at=4)
    run_fpath = tmp_path / "off/partials/run.json"
    run_fpath.write_text(json.dumps(json.loads(run_fpath.read_bytes()) | {"self_check": {"n_tokens": "9"}}))
    killed(server, args, tmp_path / "off", at=3)  # it looks, and notes what it found
    codes, output = server.run(*args, tmp_path / "off", before=looking)
    assert codes == [0] and "looked" not in output and f"saev-dist: warning: {report['finding']}" in output, output
    killed(server, args, tmp_path / "then off", at=4)
    assert server.run(*whole[0], tmp_path / "then off")[0] == [0]
    assert json.loads((tmp_path / "then off/manifest.json").read_text())["self_check"] == report


def test_a_disk_without_room_for_snapshots_is_no_obstacle_where_all_is_kept(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    killed(server, args, out, at=2 + N_BATCHES)  # as it puts the first artifact in place
    full = "import saev_dist.estimate as e; f = e.estimate; import dataclasses\n"
    full += "e.estimate = lambda *a: dataclasses.replace(f(*a), partial=10**18)"
    unfinished(server, args, tmp_path / "other")
    codes, output = server.run(*args, tmp_path / "other", before=full)
    assert codes == [1] and "and snapshots 2," in output, output
    full += "\nimport os; os.environ['SLURM_RESTART_COUNT'] = '1'"  # whose --force goes on with what is kept
    codes, output = server.run(*args, out, "--force", before=full)
    assert codes == [0], output
    assert artifact_hashes(out) == expected


# ---- merge


@pytest.mark.parametrize("flags", [[], ["--screen", "bf16"]], ids=str)
def test_merge_makes_the_artifacts_when_all_is_done(tmp_path, server, whole, flags):
    args, expected, shards = whole
    args = [args[0], *flags, *args[1:]]
    out = tmp_path / "run"
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and f"{out} is not a run" in output
    killed(server, args, out, at=6, n_ranks=2)
    codes, output = server.run("inspect", out)
    assert codes == [0] and re.search(r"kept +[1-9]\d* of 13 batches \(.*%\), in [12] partials", output), output
    codes, output = server.run(*args, out, "--dry-run")
    assert codes == [0] and re.search(r"kept +[1-9]\d* of 13 batches", output), output
    codes, output = server.run("merge", "--run", out)
    assert "going on" not in output
    assert codes == [1] and re.search(r"batches \d+ to \d+(, \d+ to \d+)* of 13 are not done. Run extract again.", output)
    n_renames = 1 + N_BATCHES  # run.json, a partial after each batch
    killed(server, args, out.with_name("b"), at=n_renames + 3)  # among the artifacts
    moved = tmp_path / "moved"
    os.symlink(shards, moved)
    codes, output = server.run("merge", "--run", out.with_name("b"), "--shards", moved)
    assert codes == [0], output
    assert artifact_hashes(out.with_name("b")) == expected
    assert json.loads((out.with_name("b") / "manifest.json").read_text())["config"]["device"] == "auto"
    codes, output = server.run("merge", "--run", out.with_name("b"))
    assert codes == [1] and "is finished: there are no partials to merge" in output
    run_fpath = out / "partials/run.json"
    content = json.loads(run_fpath.read_bytes())
    aside = run_fpath.rename(tmp_path / "run.json")
    for command in (["merge", "--run", out], [*args, out]):
        codes, output = server.run(*command)
        assert codes == [1] and "run.json is missing, so nobody can tell what run the" in output, output
    run_fpath.write_bytes(aside.read_bytes()[:100])
    codes, output = server.run(*args, out)
    assert codes == [1] and re.search(r"run.json is not JSON.*: damaged. Run extract again with --force", output), output
    assert server.run(*args, out, "--dry-run", "--force")[0] == [0]
    run_fpath.write_text(json.dumps(content | {"config": content["config"] | {"of_the_future": 1}}))
    codes, output = server.run("merge", "--run", out)
    assert codes == [1] and re.search(
        r"run.json: these are no settings of this version's extract: .*'of_the_future'. Use the version", output
    )
    for other, said in (({"sae_format": "zip"}, "sae_format is 'zip'"), ({"shards": 5}, "shards is 5; expected a path")):
        run_fpath.write_text(json.dumps(content | {"config": content["config"] | other}))
        codes, output = server.run("merge", "--run", out)
        assert codes == [1] and said in output, output


def test_a_merge_of_what_another_one_has_just_merged_says_so(tmp_path, server, whole):
    args, expected, _ = whole
    out = tmp_path / "run"
    killed(server, args, out, at=1 + N_BATCHES + 3)  # among the artifacts
    other = "import sys, subprocess, saev_dist.merge as m\nf = m.open_job\ndef late(*a):\n    job = f(*a)\n"
    other += f"    subprocess.run([sys.executable, '-m', 'saev_dist', 'merge', '--run', {str(out)!r}], check=True)\n"
    other += "    return job\nm.open_job = late"
    codes, output = server.run("merge", "--run", out, before=other)
    assert codes == [1] and output.endswith("has just been finished by another process: there are no partials to merge.\n")
    assert artifact_hashes(out) == expected


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        ("raise MemoryError", r"MemoryError"),
        ("import torch; torch.empty(2**50)", r"\[enforce fail .*can't allocate memory: you tried to allocate .* bytes.*"),
        ("raise RuntimeError('a bug')", ""),
    ],
)
def test_memory_that_runs_out_is_one_line(tmp_path, server, whole, cause, why):
    code = f"import saev_dist.extract as e\ndef full(*_): {cause}\ne._rows = full\n"
    codes, output = server.run(*whole[0], tmp_path / "run", before=code)
    assert codes == [1 if why else 70]  # an error of ours has a traceback
    said = re.search(rf"error: out of memory on the host \({why}\); lower --read-ahead, or start over", output)
    assert bool(said) == bool(why), output


def test_batches_before_one_for_which_memory_does_not_suffice_are_kept(tmp_path, server, whole):
    code = (
        "import torch, saev_dist.sae.encoder as e\nencode = e.Encoder._encode\n"
        "def full(self, acts, img_i, *rest):\n if img_i >= 8: raise torch.OutOfMemoryError('full')\n"
        " return encode(self, acts, img_i, *rest)\ne.Encoder._encode = full\n"
    )
    args = (*whole[0][:-1], "--snapshot-every", "600", whole[0][-1])
    codes, output = server.run(*args, tmp_path / "run", before=code)
    assert codes == [1] and "error: out of memory on cpu (full); lower --read-ahead" in output
    codes, output = server.run(*args, tmp_path / "run")
    assert codes == [0] and re.search(r"holds [1-9]\d* of \d+ images .* of this run: going on", output)
    assert artifact_hashes(tmp_path / "run") == whole[1]
