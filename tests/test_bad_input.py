"""Bad input: one line that names the place, exit code 1, nothing under a final name, no hang on any rank."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import saev_dist
import slurm.launch
from saev_dist.cli import main
from tests.ranks import ENV, run_cli, run_ranks
from tests.synthetic import TOPK, make_acts, make_sae, make_shards, make_weights


class Case:
    """A good set of inputs, to be spoilt."""

    def __init__(self, dpath: Path) -> None:
        self.dpath = dpath
        self.shards = make_shards(dpath / "shards", make_acts(), layers=(9, 4))
        self.sae = make_sae(dpath / "sae.pt", TOPK)
        self.out = dpath / "run"
        self.flags = {"--shards": self.shards, "--sae": self.sae, "--out": self.out, "--layer": 4}

    @property
    def args(self) -> list[str]:
        return ["extract", "--no-progress", "--self-check", "off", *(str(word) for pair in self.flags.items() for word in pair)]

    def edit(self, file: str, /, **changes: object) -> None:
        """Change fields of a JSON file; None removes one."""
        content = json.loads((self.shards / file).read_text())
        target = content if isinstance(content, dict) else content[1]
        for key, value in changes.items():
            target.pop(key) if value is None else target.__setitem__(key, value)
        (self.shards / file).write_text(json.dumps(content))

    def as_partials(self, dpath: Path) -> Path:
        """Copy a directory to where a run under way has its own."""
        return Path(shutil.copytree(dpath, self.out / "partials"))

    def header(self, change) -> None:
        """Change the SAE's header."""
        line, body = self.sae.read_bytes().split(b"\n", 1)
        header = json.loads(line)
        change(header)
        self.sae.write_bytes(json.dumps(header).encode() + b"\n" + body)

    def state(self, **changes: object) -> None:
        """Change the SAE's tensors; None removes one."""
        line, body = self.sae.read_bytes().split(b"\n", 1)
        state = torch.load(io.BytesIO(body), weights_only=True) | changes
        with open(self.sae, "wb") as file:
            file.write(line + b"\n")
            torch.save({key: value for key, value in state.items() if value is not None}, file)

    def poison(self, value: float) -> None:
        """Put a number into image 9 (example 2 of shard 1), patch 3, dimension 5 of layer 4."""
        with open(self.shards / "acts000001.bin", "r+b") as file:
            file.seek(4 * (((2 * 2 + 1) * 5 + 3) * 6 + 5))
            file.write(np.float32(value).tobytes())


def set_flag(**flags):
    return lambda case: case.flags.update({f"--{name.replace('_', '-')}": value for name, value in flags.items()})


def _add_number(case: Case) -> None:
    line, body = case.sae.read_bytes().split(b"\n", 1)
    with open(case.sae, "wb") as file:
        file.write(line + b"\n")
        torch.save(torch.load(io.BytesIO(body), weights_only=True) | {7: torch.ones(1)}, file)


def _nest(case: Case) -> None:
    with warnings.catch_warnings(action="ignore"):  # that they are a prototype
        case.state(b_enc=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


W = make_weights()
CASES = {
    "shards missing": (lambda c: shutil.rmtree(c.shards), "is not a directory"),
    "shards are a file": (set_flag(shards=__file__), "is not a directory"),
    "metadata missing": (lambda c: (c.shards / "metadata.json").unlink(), "metadata.json: No such file"),
    "metadata not JSON": (lambda c: (c.shards / "metadata.json").write_text("{"), "metadata.json is not JSON"),
    "metadata a list": (lambda c: (c.shards / "metadata.json").write_text("[]"), "should be an object"),
    "metadata too deep": (lambda c: (c.shards / "metadata.json").write_text("[" * 10**5), "is not JSON"),
    "field missing": (lambda c: c.edit("metadata.json", d_model=None), "no field 'd_model or d_vit'"),
    "field of wrong type": (lambda c: c.edit("metadata.json", d_model="6"), "'d_model' is \"6\"; it should be an integer"),
    "boolean for a number": (lambda c: c.edit("metadata.json", d_model=True), "'d_model' is true"),
    "field zero": (lambda c: c.edit("metadata.json", content_tokens_per_example=0), "is 0; it should be at least 1"),
    "field negative": (lambda c: c.edit("metadata.json", n_examples=-3), "is -3; it should be at least 1"),
    "cls_token a number": (lambda c: c.edit("metadata.json", cls_token=1), "'cls_token' is 1; it should be true or false"),
    "layers empty": (lambda c: c.edit("metadata.json", layers=[]), "list of distinct integers"),
    "protocol unknown": (lambda c: c.edit("metadata.json", protocol="3.0"), "protocol is '3.0'; this version reads 1.0.0, 1.1, 2.1"),
    "dtype unknown": (lambda c: c.edit("metadata.json", dtype="float16"), "dtype is 'float16'"),
    "shard list missing": (lambda c: (c.shards / "shards.json").unlink(), "shards.json: No such file"),
    "shard list empty": (lambda c: (c.shards / "shards.json").write_text("[]"), "non-empty list"),
    "shard missing": (lambda c: (c.shards / "acts000002.bin").unlink(), "acts000002.bin: No such file"),
    "shard short": (lambda c: os.truncate(c.shards / "acts000001.bin", 1000), "acts000001.bin holds 1,000 bytes; shards.json promises"),
    "shard outside": (lambda c: c.edit("shards.json", name="../x"), "name is '../x'; it should be a plain file name"),
    "shard absolute": (lambda c: c.edit("shards.json", name="/etc/passwd"), "plain file name"),
    "shard twice": (lambda c: c.edit("shards.json", name="acts000000.bin"), "lists acts000000.bin more than once"),
    "counts do not add up": (lambda c: c.edit("shards.json", n_examples=6), "adds up to 22 examples; metadata.json promises 23"),
    "layer not there": (set_flag(layer=5), "holds no layer 5; it holds 9, 4"),
    "layer not said": (lambda c: c.flags.pop("--layer"), "holds layers 9, 4; choose one with --layer"),
    "widths differ": (lambda c: make_sae(c.sae, d_model=7), "takes activations of width 7"),
    "SAE missing": (lambda c: c.sae.unlink(), "sae.pt: No such file"),
    "SAE a directory": (lambda c: (c.sae.unlink(), c.sae.mkdir()), "sae.pt is no SAE by itself; it holds nothing"),
    "SAE empty": (lambda c: c.sae.write_bytes(b""), "sae.pt is no SAE by itself"),
    "SAE header not JSON": (lambda c: c.sae.write_bytes(b"{x\n"), "header is not JSON"),
    "SAE truncated": (lambda c: os.truncate(c.sae, 900), "truncated or damaged"),
    "SAE header alone": (lambda c: c.sae.write_bytes(c.sae.read_bytes().split(b"\n")[0] + b"\n"), "truncated or damaged"),
    "SAE schema unknown": (lambda c: c.header(lambda h: h.update(schema=6)), "schema is 6"),
    "SAE activation unknown": (lambda c: c.header(lambda h: h["cfg"]["activation"].update(cls="Gelu")), "activation is 'Gelu'"),
    "SAE size missing": (lambda c: c.header(lambda h: h["cfg"].pop("d_model")), "no field 'd_model or d_vit'"),
    "SAE top_k zero": (lambda c: c.header(lambda h: h["cfg"]["activation"]["params"].update(top_k=0)), "'top_k' is 0"),
    "SAE top_k too large": (lambda c: c.header(lambda h: h["cfg"]["activation"]["params"].update(top_k=99)), "K is 99"),
    "SAE threshold missing": (lambda c: c.header(lambda h: h["cfg"]["activation"].update(cls="BatchTopK")), "holds no threshold; give the one of its training with --threshold"),
    "SAE tensor missing": (lambda c: c.state(W_enc=None), "no tensor W_enc"),
    "SAE tensor unknown": (lambda c: c.state(scale=torch.ones(1)), "unknown tensors (scale)"),
    "SAE tensor of wrong shape": (lambda c: c.state(b_enc=torch.ones(3)), "b_enc is torch.float32 (3,)"),
    "SAE tensor nested": (_nest, "b_enc is a nested tensor"),
    "SAE weights NaN": (lambda c: c.state(W_dec=W["w_dec_sd"] * float("nan")), "144 of 144 values of W_dec are NaN"),
    "activation NaN": (lambda c: c.poison(float("nan")), "acts000001.bin: image 9 (example 2 of the shard), patch 3, dimension 5 is nan"),
    "activation infinite": (lambda c: c.poison(-float("inf")), "image 9 (example 2 of the shard), patch 3, dimension 5 is -inf"),
    "activation too large": (lambda c: c.poison(3e38), "image 9"),
    "activation beyond all sums": (lambda c: c.poison(1e30), "acts000001.bin: image 9 (example 2 of the shard), patch 3, dimension 5 is 1e+30, the largest of"),
    "scores beyond all sums": (lambda c: c.state(W_enc=W["w_enc_ds"] * 1e25), "The activations reach 2 there, so it is what the SAE makes of them"),
    "counts absurd": (lambda c: c.edit("metadata.json", n_examples=10**30), "field 'n_examples or n_imgs' is 1e+30"),
    "shard name unprintable": (lambda c: c.edit("shards.json", name="\ud800"), "plain file name"),
    "path too long": (set_flag(shards="x" * 300), "is not a directory"),
    "SAE activation missing": (lambda c: c.header(lambda h: h["cfg"].pop("activation")), "no field 'activation'"),
    "SAE tensor named by a number": (_add_number, "unknown tensors (7)"),
    "batch absurd": (set_flag(batch_tokens=10**30), "batch_tokens must be at least 1 (and at most"),
    "top_k zero": (set_flag(top_k=0), "top_k must be at least 1 (and at most 1,000,000,000), got 0"),
    "percentile out of range": (set_flag(percentile=101), "percentile must lie in 0 to 100"),
    "snapshots never": (set_flag(snapshot_every="inf"), "snapshot_every must be a number of seconds, 0 or more, got inf"),
    "tf32 on a CPU": (set_flag(precision="tf32", device="cpu"), "--precision tf32 needs a CUDA device"),
    "screen with bf16": (set_flag(precision="bf16", screen="bf16"), "--screen bf16 gives fp32 scores; it does not go with --precision bf16"),
    "out too long": (set_flag(out="x" * 300), "File name too long"),
    "out below a file": (lambda c: c.flags.update({"--out": c.sae / "run"}), "sae.pt is a file; --out takes a directory"),
    "out the shards": (lambda c: c.flags.update({"--out": c.shards}), "holds metadata.json: it is a directory of shards"),
    "out above the shards": (lambda c: c.as_partials(c.shards), "partials holds metadata.json: it is not of a run under way"),
    "out above a run": (lambda c: (c.as_partials(c.shards) / "metadata.json").rename(c.out / "partials/manifest.json"), "partials holds manifest.json: it"),
    "out a link to nowhere": (lambda c: c.out.symlink_to("purged"), "leads to no directory. Remove it, or choose another --out."),
    "partials a link to nowhere": (lambda c: (c.out.mkdir(), (c.out / "partials").symlink_to("purged")), "partials leads to no directory. Remove"),
    "out a file": (lambda c: c.flags.update({"--out": c.sae}), "sae.pt is a file; --out takes a directory"),
    "TOML missing": (set_flag(config="nowhere.toml"), "nowhere.toml: No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, name):
    spoil, message = CASES[name]
    case = Case(tmp_path)
    spoil(case)
    with pytest.raises(SystemExit) as stop:
        main(case.args)
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert err.startswith("saev-dist: error: ") and err.count("\n") == 1, err
    assert message in err
    assert list(case.out.glob("*.*")) == []


def test_a_good_case_passes(tmp_path):
    case = Case(tmp_path)
    main(case.args)
    assert (case.out / "manifest.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda_is_said(tmp_path, capsys):
    case = Case(tmp_path)
    case.flags["--device"] = "cuda"
    with pytest.raises(SystemExit, match=r"^1$"):
        main(case.args)
    assert "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--top-k", "many"], ["--unknown"], ["--rank-by", "shard"], ["--top-k"]])
def test_wrong_usage_exits_with_2(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main([*Case(tmp_path).args, *flags])
    assert stop.value.code == 2


ESCAPED = Path("/tmp") / f"saev_dist_escaped_{os.getpid()}"


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {ESCAPED}",)


def test_a_malicious_checkpoint_runs_nothing(tmp_path, capsys):
    case = Case(tmp_path)
    header = case.sae.read_bytes().split(b"\n", 1)[0]
    buffer = io.BytesIO()
    torch.save({"W_enc": Bomb()}, buffer)
    for body in (buffer.getvalue(), pickle.dumps(Bomb()), pickle.dumps({"W_enc": Bomb()}, protocol=4)):
        case.sae.write_bytes(header + b"\n" + body)
        with pytest.raises(SystemExit, match=r"^1$"):
            main(case.args)
        assert capsys.readouterr().err.count("\n") == 1
        assert not ESCAPED.exists()
    # The bombs are live: unpickling one by hand leaves the file.
    pickle.loads(pickle.dumps(Bomb()))
    assert ESCAPED.exists()
    ESCAPED.unlink()


def test_a_pickle_in_the_metadata_is_never_loaded(tmp_path):
    import base64

    case = Case(tmp_path)
    case.edit("metadata.json", data=base64.b64encode(pickle.dumps(Bomb())).decode())
    main(case.args)
    assert not ESCAPED.exists()


def in_small_tmpfs(dpath: Path, megabytes: int):
    """Mount a tmpfs; skip where one may not."""
    dpath.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(dpath)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")


@pytest.fixture
def small_disk(tmp_path):
    dpath = tmp_path / "small"
    in_small_tmpfs(dpath, 1)
    yield dpath
    subprocess.run(["umount", str(dpath)], check=True)


@pytest.mark.parametrize("filled_kb", [700, 1000])
def test_a_full_disk_is_one_line_and_leaves_no_artifact(tmp_path, small_disk, capsys, monkeypatch, filled_kb):
    import saev_dist.estimate

    # The space goes after the check: another user of the disk.
    monkeypatch.setattr(saev_dist.estimate, "free_disk", lambda dpath: 10**12)
    case = Case(tmp_path / "case")
    case.flags |= {"--out": small_disk / "run", "--top-k": 2000}
    (small_disk / "other").write_bytes(bytes(filled_kb * 1024))
    with pytest.raises(SystemExit, match=r"^1$"):
        main(case.args)
    err = capsys.readouterr().err
    *warnings, error = err.splitlines()
    assert error.startswith("saev-dist: error: ") and "No space left on device; free some space" in error, err
    assert all(line.startswith("saev-dist: warning: no snapshot") for line in warnings), err
    assert list((small_disk / "run").glob("*.*")) == []
    (small_disk / "other").unlink()
    case.flags["--top-k"] = 20
    main([*case.args[:1], "--force", *case.args[1:]])
    assert (small_disk / "run/manifest.json").exists()


@pytest.mark.parametrize("command", ["replay", "launcher"])
def test_a_disk_that_is_quite_full_is_one_line_in_every_job(tmp_path, small_disk, capsys, command):
    """Not a byte is left for the lock, or for what submitit writes."""
    case = Case(tmp_path / "case")
    case.flags |= {"--out": small_disk / "run", "--top-k": 5}
    main(case.args)
    capsys.readouterr()
    with suppress(OSError), open(small_disk / "other", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    start, args = main, ["replay", "--run", str(small_disk / "run"), "--no-pictures"]
    if command == "launcher":
        start, args = slurm.launch.main, ["--cluster", "local", "--gpus-per-node", "0", "--logs", str(small_disk)]
        args += [*case.args, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"^1$"):
        start(args)
    *warnings, line = capsys.readouterr().err.splitlines()
    assert all(warning.startswith("saev-dist: warning: ") for warning in warnings)
    assert line.split(": ")[1] == "error" and str(small_disk) in line and "No space left on device; free some space" in line
    assert not (small_disk / "run/partials").exists()


def test_another_programs_manifest_is_left_alone(tmp_path, capsys):
    case = Case(tmp_path / "case")
    out = tmp_path / "app"
    out.mkdir()
    for text in ('{"name": "app"}', '[{"file": "a.js"}]', "CACHE MANIFEST"):
        (out / "manifest.json").write_text(text)
        for more in ([], ["--force"]):
            with pytest.raises(SystemExit, match=r"^1$"):
                main([*case.args, "--out", str(out), *more])
            assert "app/manifest.json is not that of a run of saev-dist. Choose another --out." in capsys.readouterr().err
        assert (out / "manifest.json").read_text() == text


def test_files_of_no_run_in_the_output_directory_are_told_of(tmp_path, capsys):
    case = Case(tmp_path / "case")
    out = tmp_path / "out"
    case.flags["--out"] = out
    (out / "slurm").mkdir(parents=True)  # the launcher's
    main([*case.args, "--dry-run"])
    assert "which no run made" not in capsys.readouterr().err
    (out / "notes.txt").touch()
    (out / "sub").mkdir()
    main(case.args)
    assert (
        f"warning: {out} holds notes.txt and 1 more, which no run made; the artifacts will lie beside that."
        in capsys.readouterr().err
    )
    main([*case.args, "--force"])
    assert "which no run made" not in capsys.readouterr().err and (out / "notes.txt").exists()


def test_a_directory_called_partials_keeps_what_no_run_wrote(tmp_path, capsys):
    case = Case(tmp_path / "case")
    out = tmp_path / "out"
    (out / "partials/more").mkdir(parents=True)
    case.flags |= {"--out": out, "--sae": case.sae.rename(out / "partials/sae.pt")}
    (out / "partials/acts000000.bin").touch()
    leftovers = [out / "partials" / name for name in ("distributions.00007-abc.bin", ".x.partial.tmp", "top_values.pt")]
    for more in ([], ["--force"]):
        for fpath in leftovers:
            fpath.touch()
        main([*case.args, *more])
        warned = (
            f"warning: {out} holds partials/acts000000.bin and 2 more, which no run made; the artifacts will lie beside that."
        )
        assert (warned in capsys.readouterr().err) == (not more)
        assert sorted(fpath.name for fpath in (out / "partials").iterdir()) == ["acts000000.bin", "more", "sae.pt"]
        assert (out / "manifest.json").exists()


def test_a_percentile_that_is_meant_as_a_share_is_warned_of(tmp_path, capsys):
    case = Case(tmp_path / "case")
    main([*case.args, "--percentile", "0.99"])
    assert "warning: --percentile 0.99 is below the 1st percentile; for the 99th write 99." in capsys.readouterr().err


def test_what_lies_one_step_away_is_named(tmp_path, capsys):
    case = Case(tmp_path / "case")
    main(["convert", str(case.sae), str(tmp_path / "case" / "plain")])
    capsys.readouterr()
    for flags, words in (
        (["--sae", str(case.sae.parent)], None),
        (["--sae", str(case.shards)], f"{case.shards} is a directory of shards; give it to --shards, and an SAE to --sae."),
    ):
        with pytest.raises(SystemExit, match=r"^1$"):
            main([*case.args, *flags])
        err = capsys.readouterr().err
        assert (words in err) if words else "Did you mean" not in err, err  # there are two
    with pytest.raises(SystemExit, match=r"^1$"):
        main([*case.args, "--shards", str(case.dpath)])
    assert f"{case.dpath / 'metadata.json'}: No such file" in (err := capsys.readouterr().err)
    assert err.endswith(f"Did you mean {case.shards}?\n")
    main([*case.args, "--out", str(tmp_path / "runs/a")])
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["verify", "--run", str(tmp_path / "runs")])
    assert capsys.readouterr().err.endswith(f"Did you mean {tmp_path / 'runs/a'}?\n")
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["demo", "--out", str(case.sae)])
    assert f"{case.sae} is a file; --out takes a directory to make." in capsys.readouterr().err
    case.sae.unlink()
    (case.sae.parent / "hparams.json").write_text('{"lr": 1}\n')  # begins as saev's own do
    with pytest.raises(SystemExit, match=r"^1$"):
        main([*case.args, "--sae", str(case.sae.parent)])
    assert f"Did you mean {tmp_path / 'case' / 'plain'}?" in capsys.readouterr().err


def test_a_disk_too_small_is_refused_before_the_start(tmp_path, small_disk, capsys):
    case = Case(tmp_path / "case")
    case.flags |= {"--out": small_disk / "run", "--top-k": 20_000}
    with pytest.raises(SystemExit, match=r"^1$"):
        main(case.args)
    assert "of disk" in capsys.readouterr().err
    assert not (small_disk / "run").exists()


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    case = Case(tmp_path)
    for writable_by in ("nobody",):
        tmp_path.chmod(0o755)
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        script = f"from saev_dist.cli import main; main({case.args!r})"
        if subprocess.run([*as_nobody, "true"], capture_output=True).returncode:
            pytest.skip(f"becoming {writable_by} needs root")
        for parent in (tmp_path, *tmp_path.parents):
            if not os.access(parent, os.X_OK) or not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        readable = subprocess.run([*as_nobody, sys.executable, "-c", "import saev_dist"], env=ENV, capture_output=True)
        if readable.returncode:
            pytest.skip("this Python is not readable by other users")
        done = subprocess.run([*as_nobody, sys.executable, "-c", script], env=ENV, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("saev-dist: error: ") and "Permission denied" in done.stderr


@pytest.mark.parametrize("name", ["metadata not JSON", "activation NaN", "shard short", "SAE truncated", "out a file"])
def test_every_rank_stops_and_one_error_is_shown(tmp_path, name):
    spoil, message = CASES[name]
    case = Case(tmp_path)
    spoil(case)
    run = run_cli if name == "activation NaN" else run_ranks
    done = run(*case.args, "--batch-tokens", 10, n_ranks=3)
    assert done.returncode == 1
    shown = [line for line in done.stderr.splitlines() if "saev-dist: error: " in line]
    assert len(shown) == 1 and message in shown[0], done.stderr
    assert f'File "{Path(saev_dist.__file__).parent}' not in done.stderr, "a traceback of ours (torchrun prints its own)"
    assert list(case.out.glob("*.*")) == []


def test_a_rank_that_cannot_read_the_flags_of_all_says_so(tmp_path, monkeypatch, capsys):
    """What is wrong in the file rank 0 says."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = tmp_path / "flags.toml"
    for says in (f"saev-dist: error: rank 1: {flags}: No such file or directory; --config takes a TOML file.\n", ""):
        with pytest.raises(SystemExit, match=r"^1$"):
            main(["extract", "--config", str(flags)])
        assert capsys.readouterr().err == says
        flags.write_text("top_k = ")
