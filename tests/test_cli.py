"""The program's surface: help, presets, TOML under the flags."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from saev_dist.cli import main, parse
from saev_dist.config import Demo, Extract, Replay
from saev_dist.output import printing
from saev_dist.report import flags_of
from tests.ranks import fails, run_ranks
from tests.synthetic import make_acts, make_sae, make_shards

ROOT = Path(__file__).parent.parent
NEEDED = ["--shards", "s", "--sae", "a.pt", "--out", "o"]


@pytest.mark.parametrize("fpath", sorted((ROOT / "configs").glob("*.toml")), ids=lambda fpath: fpath.name)
def test_presets_are_defaults_that_flags_override(fpath):
    cfg = parse(["extract", "--config", str(fpath), *NEEDED])
    assert isinstance(cfg, Extract) and cfg.shards == Path("s")
    assert cfg != Extract(shards=Path("s"), sae=Path("a.pt"), out=Path("o"), config=fpath), "a preset that sets nothing"
    assert parse(["extract", f"--config={fpath}", *NEEDED, "--top-k", "7"]).top_k == 7


def test_a_toml_file_may_hold_everything(tmp_path):
    fpath = tmp_path / "run.toml"
    fpath.write_text('shards = "s"\nsae = "a.pt"\nout = "o"\npre_bias = true\nprogress = false\npercentile = 95.5\n')
    cfg = parse(["extract", "--config", str(fpath)])
    assert (cfg.sae, cfg.pre_bias, cfg.progress, cfg.percentile) == (Path("a.pt"), True, False, 95.5)
    assert parse(["extract", "--config", str(fpath), "--no-pre-bias", "--progress"]).pre_bias is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk = 3", "sets 'topk', which extract does not know; did you mean 'top_k'?"),
        ("top-k = 3", "did you mean 'top_k'?"),
        ("colour = 3", "sets 'colour', which extract does not know; it knows shards,"),
        ("run = 'r'", "sets 'run', which extract does not know; it is one of replay: write --config among the flags of that."),
        ("no_img_acts = true", 'which extract does not know; write "img_acts = false".'),
        ("no-pre-bias = true", 'write "pre_bias = false".'),
        ("config = 'x.toml'", "sets 'config', which extract does not know; it knows shards,"),
        ("a b", "is not TOML"),
        ("layer = [1]", "layer is [1]; expected a whole number."),
        ('top_k = "64"', "top_k is '64'; expected a whole number."),
        ("top_k = true", "top_k is True; expected a whole number."),
        ("threshold = '1'", "threshold is '1'; expected a number."),
        ("metrics = 1", "metrics is 1; expected true or false."),
        ("pre_bias = 'yes'", "pre_bias is 'yes'; expected true or false."),
        ("sae = 3", "sae is 3; expected a path in quotes."),
        ("rank_by = 'images'", "rank_by is 'images'; expected one of 'patch', 'image'."),
        ('out = "a\\u0000b"', "out is 'a\\x00b'; expected a path in quotes."),
        ("top_k = " + 5000 * "[", "is not TOML"),
        ("top_k = " + 5000 * "9", "is not TOML"),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_toml_file_is_named(tmp_path, capsys, text, message):
    fpath = tmp_path / "bad.toml"
    fpath.write_text(text)
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["extract", "--config", str(fpath), *NEEDED])
    assert message in capsys.readouterr().err


def test_values_of_a_toml_file_may_begin_with_a_dash_and_the_file_with_a_mark(tmp_path):
    fpath = tmp_path / "run.toml"
    fpath.write_text('\ufeffout = "-o"\ninput_mean = "-m"\nthreshold = -1.5\n')
    cfg = parse(["extract", "--config", str(fpath), *NEEDED[:4]])
    assert (cfg.out, cfg.input_mean, cfg.threshold) == (Path("-o"), Path("-m"), -1.5)


def test_a_command_without_config_knows_no_such_flag(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["verify", "--run", "r", "--config", str(tmp_path / "not-there.toml")])
    assert "Unrecognized options: --config" in capsys.readouterr().err


def test_lists_in_a_toml_file(tmp_path, capsys):
    fpath = tmp_path / "replay.toml"
    flags = ["replay", "--config", str(fpath), "--run", "r"]
    fpath.write_text("features = [3, 5]\nlog_freq_range = [-6, 0.5]\ngrid = [4, 3]\nimg_scale = 2\n")
    cfg = parse(flags)
    assert (cfg.features, cfg.log_freq_range, cfg.grid, cfg.img_scale) == ((3, 5), (-6.0, 0.5), (4, 3), 2.0)
    fpath.write_text("features = 3")
    assert parse(flags).features == (3,)
    fpath.write_text("features = []")
    assert parse(flags).features == ()
    for text, found in (("grid = [4]", "[4]"), ("grid = [4, 'a']", "[4, 'a']")):
        fpath.write_text(text)
        with pytest.raises(SystemExit, match=r"^1$"):
            main(flags)
        assert f"grid is {found}; expected a list of 2, each a whole number." in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["extract"], ["replay"], ["verify"], ["inspect"], ["demo"]])
def test_help_names_every_flag_without_loading_torch(command):
    script = f"import sys; from saev_dist.cli import main\ntry: main({[*command, '--help']!r})\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"extract": "--rank-by", "inspect": "PATH", "demo": "--seed"}.get(
        "".join(command), "--features" if command else "extract"
    )
    assert expected in done.stdout
    assert [word for word in ("{None}", "None}", "default: None", "(default: )") if word in done.stdout] == []


def test_an_sae_is_not_converted_into_itself(tmp_path, capsys):
    sae = make_sae(tmp_path / "sae.pt")
    before = sae.read_bytes()
    (tmp_path / "link.pt").symlink_to(sae)
    for target in (sae, tmp_path / "link.pt"):
        assert f"{target} is the SAE itself" in fails(capsys, "convert", sae, target, "--force")
    assert sae.read_bytes() == before


def test_what_is_no_file_is_not_replaced_by_an_sae(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    text = fails(capsys, "convert", make_sae(tmp_path / "sae.pt"), tmp_path / "pipe", "--force")
    assert "pipe is there and no regular file; choose another name." in text and (tmp_path / "pipe").is_fifo()


def test_an_sae_is_not_converted_among_its_own_files(copy_sae, capsys):
    for name in ("sparsify/topk", "sae_lens/standard_none_pre"):
        sae = copy_sae(name)
        before = {fpath.name: fpath.read_bytes() for fpath in sae.iterdir()}
        assert f"such as {sae / 'converted.safetensors'}." in fails(capsys, "convert", sae, sae)
        for target in ("sae.safetensors", "cfg.json", "sae_weights.safetensors"):
            assert "would be one of the SAE's own files" in fails(capsys, "convert", sae, sae / target, "--force")
        assert {fpath.name: fpath.read_bytes() for fpath in sae.iterdir()} == before
        main(["convert", str(sae), str(sae / "converted.safetensors")])
        main(["inspect", str(sae)])


@pytest.mark.parametrize("command", ["extract", "inspect", "convert"])
def test_help_begins_with_what_must_be_given(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    text = capsys.readouterr().out
    needed = {"extract": "--shards PATH", "inspect": "--shards PATH", "convert": "--force"}[command]
    assert text.index(needed) < text.index("--sae-format")


@pytest.mark.parametrize("argv", [[], ["extract"], ["inspect"]])
def test_flags_that_are_missing_altogether_are_wrong_usage(argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "cfg",
    [
        Replay(run=Path("/r")),
        Replay(
            run=Path("/r"), sae=Path("hf://owner/repo/path@v1"), images=Path("/my pictures"), features=(3, 5), sort="max",
            log_freq_range=(-3.5, 0.0), grid=(4, 3), patch_size=14, img_scale=2.0, all=True, progress=False,
        ),
        Replay(run=Path("/r"), pictures=False, workers=2),
        Replay(run=Path("/r"), fit="crop", resize=(224, 224), keep_aspect=True),
    ],
)  # fmt: skip
def test_the_flags_of_a_config_make_it_again(cfg):
    assert parse(["replay", *flags_of(cfg, without=())]) == cfg
    assert flags_of(replace(cfg, progress=False), without={"progress"}) == flags_of(replace(cfg, progress=True), without={})


def test_a_word_for_a_number_is_told_in_words_of_the_flag(capsys):
    for word in ("eleven", "None"):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["extract", *NEEDED, "--layer", word])
        err = " ".join(capsys.readouterr().err.replace("│", "").split())
        assert f"Error parsing --layer: invalid literal for int() with base 10: '{word}'" in err, err
        assert "NoneType" not in err and "see saev-dist extract --help" in err


def test_features_may_be_told_apart_by_commas():
    for words in ("3,17,5", "3 17 5", "3,17 5", "3, 17, 5", "3 , 17,5,"):
        cfg = parse(["replay", "--features", *words.split(), "--run", "3,17"])
        assert cfg.features == (3, 17, 5) and cfg.run == Path("3,17")
    for flag in ("--features=3,17,5", "--features=3,17,5,"):
        cfg = parse(["replay", flag, "--run", "3,17"])
        assert cfg.features == (3, 17, 5) and cfg.run == Path("3,17")


def test_a_flag_of_several_values_is_given_once(tmp_path, capsys):
    (tmp_path / "replay.toml").write_text("features = [3, 5]")
    flags = ["--run", "r", "--config", str(tmp_path / "replay.toml")]
    assert parse(["replay", *flags, "--features", "7", "9"]).features == (7, 9), "a file's are no second time"
    for first, second in ((["--features", "3"], ["--features", "5", "7"]), (["--features=3"], ["--features=5"])):
        with pytest.raises(SystemExit, match=r"^1$"):
            main(["replay", *first, *flags, *second])
        assert (
            "--features is given twice, and only the last would count; write it once: --features A B."
            in capsys.readouterr().err
        )
    assert parse(["extract", *NEEDED, "--top-k", "3", "--top-k", "5"]).top_k == 5


def test_commands_of_the_launcher_are_pointed_to(capsys):
    for command in ("status", "cancel", "pipeline"):
        with pytest.raises(SystemExit, match=r"^2$"):
            main([command, "--run", "r"])
        said = f"saev-dist: '{command}' is a command of the launcher: python -m slurm.launch {command} --help\n"
        assert capsys.readouterr().err == said


def test_the_demo_needs_no_flags():
    assert parse(["demo"]) == Demo()


def test_seeds_of_the_demo_are_those_that_torch_takes(capsys, tmp_path):
    assert [parse(["demo", "--seed", str(seed)]).seed for seed in (-(2**63), 2**64 - 1)] == [-(2**63), 2**64 - 1]
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(SystemExit, match="1"):
            main(["demo", "--out", str(tmp_path / "out"), "--seed", str(seed)])
        error = f"saev-dist: error: seed must be a number of 64 bits (-2^63 to 2^64 - 1), got {seed}.\n"
        assert capsys.readouterr().err == error


def test_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("saev-dist 0.")


def test_a_rank_that_may_be_alone_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["extrct"])
    assert caught.value.code == 2 and "did you mean 'extract'" in capsys.readouterr().err


def test_another_system_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit) as caught:
        main(["demo"])
    assert caught.value.code == 1
    assert (
        capsys.readouterr().err
        == "saev-dist: error: saev-dist runs on Linux; this is darwin. Use a container, or another machine.\n"
    )


@pytest.mark.parametrize("command", ["saev_dist extract", "slurm.launch"])
def test_help_may_be_cut_off(command):
    done = subprocess.run(f"{sys.executable} -m {command} --help | head -1", shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and not done.stderr, done.stderr


def test_nobody_need_listen():
    done = subprocess.run(f"{sys.executable} -m saev_dist inspect nowhere >&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("saev-dist: error: nowhere is not there")


def test_a_description_may_be_cut_off(tmp_path):
    shards = make_shards(tmp_path / "shards", make_acts(3))
    done = subprocess.run(f"{sys.executable} -m saev_dist inspect {shards} | true", shell=True, capture_output=True, text=True)
    assert not done.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("saev_dist --help", "saev-dist: error"),
        ("slurm.launch --help", "slurm.launch: error"),
    ],
)
def test_a_full_disk_under_the_output_is_one_line(tmp_path, command, says):
    command = command.format(shards=make_shards(tmp_path / "shards", make_acts(3)))
    done = subprocess.run(f"{sys.executable} -m {command} > /dev/full", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"{says}: cannot print: No space left on device.\n")


@pytest.mark.parametrize("command", [["inspect", "{shards}"], ["demo", "--out", "{shards}/demo"]], ids=" ".join)
def test_so_it_is_for_a_command_that_computes(tmp_path, command):
    shards = make_shards(tmp_path / "shards", make_acts(3))
    done = run_ranks(
        *(word.format(shards=shards) for word in command), before="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    )
    assert (done.returncode, done.stderr) == (1, "saev-dist: error: cannot print: No space left on device.\n")


@pytest.mark.parametrize(
    ("encoding", "name", "shown"),
    [("ascii", "\xe9 \u2026".encode(), r"\xe9 \u2026"), ("latin-1", b"\xe2\x80\xa6", r"\u2026"), ("utf-8", b"\xff", r"\udcff")],
)
def test_a_name_that_the_output_cannot_encode_is_escaped(tmp_path, encoding, name, shown):
    path = os.fsdecode(os.fsencode(tmp_path / "shards") + name)
    make_shards(Path(path), make_acts(3))
    done = run_ranks("inspect", path, before=f"import sys; sys.stdout.reconfigure(encoding={encoding!r}, errors='strict')")
    assert (done.returncode, done.stderr) == (0, "") and f"shards{shown}" in done.stdout


@pytest.mark.parametrize("command", ["saev_dist extract", "slurm.launch"])
def test_help_is_printed_in_ascii(command):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(f"{sys.executable} -m {command} --help", shell=True, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "usage: " in done.stdout


def test_what_could_not_be_printed_changes_no_other_exit_code():
    """As that of a job which is told to leave: it would not be begun again."""
    code = "from saev_dist.output import printing\nwith printing():\n print(1); raise SystemExit(75)"
    command = f"{sys.executable} -c '{code}' > /dev/full"
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # so that it is only found at the end
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")


def test_errors_of_files_are_not_those_of_the_output():
    with pytest.raises(OSError, match="of a file"), printing():
        raise OSError(errno.EIO, "of a file")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("(r := os.pipe(), os.close(r[0]))[0][1]", ""),
        ("os.open('/dev/full', os.O_WRONLY)", "saev-dist: warning: cannot print: No space left on device.\n"),
    ],
    ids=["nobody reads", "full"],
)
def test_where_nothing_can_be_printed_a_run_is_finished_all_the_same(tmp_path, output, said):
    shards, sae, out = make_shards(tmp_path / "shards", make_acts(3)), make_sae(tmp_path / "sae.pt"), tmp_path / "run"
    flags = ["--shards", shards, "--sae", sae, "--out", out, "--no-progress", "--self-check", "off"]
    lost = f"import os; os.dup2({output}, 1)"
    for command in (["extract", *flags], ["replay", "--run", out, "--no-pictures", "--n-features", 1, "--no-progress"]):
        done = run_ranks(*command, before=lost)
        assert (done.returncode, done.stderr) == (0, said)
    assert (out / "manifest.json").exists() and (out / "visuals").exists() and not (out / "partials").exists()
    assert run_ranks("extract", *flags, "--dry-run", "--force", before=lost).returncode == 1


def test_a_closed_standard_error_is_one_that_nobody_reads(tmp_path):
    shards, sae, out = make_shards(tmp_path / "shards", make_acts(3)), make_sae(tmp_path / "sae.pt"), tmp_path / "run"
    closed = "import os, sys; os.close(2); sys.stderr = None"
    done = run_ranks("extract", "--shards", shards, "--sae", sae, "--out", out, before=closed)  # with a warning of the SAE
    assert done.returncode == 0 and (out / "manifest.json").exists() and done.stdout.startswith("tokens "), done.stdout
    done = run_ranks("inspect", tmp_path / "nowhere", before=closed)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("words", [["bogus"], ["extract"]])
def test_wrong_usage_is_told_where_standard_output_is_closed(words):
    done = run_ranks(*words, before="import os, sys; os.close(1); sys.stdout = None")
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr


def test_commands_of_one_process_refuse_several(tmp_path):
    for command in (["inspect", "x"], ["merge", "--run", "x"], ["convert", "x", "y"], ["demo"]):
        done = run_ranks(*command, n_ranks=2, before=f"import os; os.chdir({str(tmp_path)!r})")
        lines = [line for line in done.stderr.splitlines() if "saev-dist: " in line]
        assert done.returncode == 1
        assert lines == [f"saev-dist: error: rank 0: {command[0]} is one process; there are 2. Start it without torchrun."]


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    done = run_ranks("inspect", "x", before=f"import os; os.mkdir(p := {str(tmp_path / 'gone')!r}); os.chdir(p); os.rmdir(p)")
    assert done.returncode == 1 and "the working directory is gone; change to one that is there." in done.stderr


@pytest.mark.parametrize(("word", "meant"), [("extrct", "extract"), ("reply", "replay")])
def test_a_misspelt_command_is_answered_with_the_nearest(capsys, word, meant):
    with pytest.raises(SystemExit, match=r"^2$"):
        main([word, "--out", "x"])
    assert f"'{word}' is no command: did you mean '{meant}'?" in capsys.readouterr().err


def test_python_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "saev_dist", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "saev-dist demo" in done.stdout
