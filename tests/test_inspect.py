"""`inspect` describes what is sound and refuses what is not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist.cli import main
from tests.ranks import fails
from tests.synthetic import make_acts, make_sae, make_shards


@pytest.fixture
def inputs(tmp_path):
    shards = make_shards(tmp_path / "shards", make_acts(), layers=(9, 4), cls_token=True)
    sae = make_sae(tmp_path / "sae.pt")
    args = ["--shards", str(shards), "--sae", str(sae), "--layer", "4", "--top-k", "8"]
    main(["extract", *args, "--out", str(tmp_path / "run"), "--no-progress"])
    return tmp_path


def refused(capsys, path, *flags: str) -> str:
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["inspect", str(path), *flags])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_what_is_sound_is_described(inputs, capsys):
    capsys.readouterr()
    main(["inspect", str(inputs / "shards")])
    text = capsys.readouterr().out
    assert "protocol 2.1, 4 files" in text and "23 × 5 patches, and a CLS token" in text and "layer 9" in text
    main(["inspect", str(inputs / "shards"), "--layer", "4"])
    text = capsys.readouterr().out
    assert "layer 4" in text and "layer 9" not in text
    main(["inspect", str(inputs / "sae.pt")])
    text = capsys.readouterr().out
    assert "saev, schema 5, Relu" in text and re.search(r"^format +saev$", text, re.M) and "6 -> 24 features" in text
    main(["inspect", str(inputs / "run")])
    text = capsys.readouterr().out
    run = inputs / "run"
    assert "slots are sound" in text and f"none: saev-dist replay --run {run}" in text
    (run / "visuals.partial").mkdir()
    main(["inspect", str(run)])
    assert f"none (one is drawn in part): saev-dist replay --run {run}" in capsys.readouterr().out
    main(["replay", "--run", str(run), "--no-pictures", "--n-features", "2", "--no-progress"])
    main(["inspect", str(run)])
    assert f"{run}/visuals/index.html: open it in a browser\n" in capsys.readouterr().out
    (run / "visuals.partial").mkdir()
    main(["inspect", str(run)])
    assert "open it in a browser (another is drawn in part; the same replay goes on)\n" in capsys.readouterr().out
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"wall_s": {}}))  # as another `extract --force` would have it
    main(["inspect", str(run)])
    assert (
        f"shows what was here before the last extract. Draw it again: saev-dist replay --run {run}" in capsys.readouterr().out
    )


def test_what_others_wrote_is_printed_as_text(inputs, capsys):
    fpath = inputs / "shards/metadata.json"
    metadata = json.loads(fpath.read_text())
    fpath.write_text(json.dumps(metadata | {"ckpt": "a\x1b[2J\nimages  none"}))
    capsys.readouterr()
    main(["inspect", str(inputs / "shards")])
    text = capsys.readouterr().out
    assert r"test a\x1b[2J\nimages  none, width 6" in text and len(re.findall("^images", text, re.M)) == 1


@pytest.mark.parametrize(
    ("name", "flags", "what"),
    [
        ("run", ["--shards", "s"], "s does not apply: "),
        ("sae.pt", ["--layer", "4"], "--layer 4 is one of shards, and"),
        ("run", ["--layer", "4"], "--layer 4 does not apply: "),
        (
            "shards",
            ["--activation", "topk:3", "--no-pre-bias"],
            "--no-pre-bias --activation topk:3 does not apply: ",
        ),
    ],
)
def test_flags_that_would_be_ignored_are_refused(inputs, capsys, name, flags, what):
    assert what in refused(capsys, inputs / name, *flags)


def test_nan_in_a_sampled_image_is_named(inputs, capsys):
    with open(inputs / "shards/acts000000.bin", "r+b") as file:
        file.seek(4 * 6)  # CLS of layer 9 comes first
        file.write(np.float32("nan").tobytes())
    assert "image 0 (example 0 of the shard), patch 0, dimension 0 is nan" in refused(capsys, inputs / "shards")


def test_a_short_shard_is_named(inputs, capsys):
    fpath = inputs / "shards/acts000001.bin"
    fpath.write_bytes(fpath.read_bytes()[:-4])
    assert "acts000001.bin holds" in refused(capsys, inputs / "shards")


def forget_sizes(run: Path) -> None:
    """As an older version's manifest, which does not list the artifacts."""
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["artifacts"]
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_that_lacks_an_artifact_is_not_sound(inputs, capsys):
    """Also one that neither inspect nor replay reads."""
    flags = ["--shards", str(inputs / "shards"), "--layer", "4", "--sae", str(inputs / "sae.pt"), "--top-k", "8"]
    again = ["extract", *flags, "--out", str(inputs / "run")]
    main(again)
    assert "holds this run, finished: nothing to do." in capsys.readouterr().out
    fpath = inputs / "run/img_acts.npz"
    content = fpath.read_bytes()
    fpath.write_bytes(content[:-1])
    said = f"{fpath} holds {len(content) - 1:,} bytes of {len(content):,}; run extract again with --force."
    assert said in refused(capsys, inputs / "run") and said in fails(capsys, *again)
    fpath.unlink()
    said = f"{fpath}: No such file or directory; run extract again with --force."
    assert said in refused(capsys, inputs / "run") and said in fails(capsys, *again)
    main([*again, "--force"])
    assert fpath.read_bytes() == content
    main(["inspect", str(inputs / "run")])
    fpath.unlink()
    forget_sizes(inputs / "run")
    main(["inspect", str(inputs / "run")])


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("left_out", [None], "left_out: the top level is null; it should be an object."),
        ("shards.n_examples", 2**70, "field 'n_examples' is 1.1805916207174113e+21; it should be at least 1, and sane."),
        ("shards.n_patches", 0, "field 'n_patches' is 0; it should be at least 1, and sane."),
        ("metrics.n_dead", 10**400, "field 'n_dead' is huge; it should be at least 0, and at most 24."),
        ("metrics.n_dead", -1, "field 'n_dead' is -1; it should be at least 0, and at most 24."),
    ],
)
def test_a_manifest_of_impossible_numbers_is_refused(inputs, capsys, where, value, message):
    fpath = inputs / "run/manifest.json"
    manifest = json.loads(fpath.read_text())
    *above, name = where.split(".")
    (manifest[above[0]] if above else manifest)[name] = value
    fpath.write_text(json.dumps(manifest))
    line = refused(capsys, inputs / "run")
    assert f"{fpath}, " in line and message in line


def test_altered_slots_are_noticed(inputs, capsys):
    forget_sizes(inputs / "run")
    values = torch.load(inputs / "run/top_values.pt", weights_only=True)
    values[3, :2] = torch.tensor([1.0, 2.0])
    torch.save(values, inputs / "run/top_values.pt")
    assert "scores are in descending order" in refused(capsys, inputs / "run")
    torch.save(values[:, :4], inputs / "run/top_values.pt")
    assert "the manifest promises a tensor (24, 8)" in refused(capsys, inputs / "run")
    (inputs / "run/top_values.pt").write_bytes(b"PK")
    assert "top_values.pt is damaged" in refused(capsys, inputs / "run")


def test_anything_else_is_refused(inputs, capsys):
    assert "nowhere is not there; inspect takes a directory of shards, an SAE, or a run." in refused(capsys, inputs / "nowhere")
    line = refused(capsys, inputs)
    assert "is no SAE by itself; it holds " in line and "Did you mean" in line and "Nor is it" not in line
    (inputs / "odd").mkdir()
    line = refused(capsys, inputs / "odd")
    assert "it holds nothing. An SAE is one of saev (one file); " in line
    assert line.endswith("Nor is it a directory of shards (metadata.json) or a run (manifest.json).\n")
    for link in ("https://huggingface.co/a/b", "http://hf.co/a/b"):
        said = f"{link} is no path; an SAE on the Hub is hf://owner/repo, and if need be /path and @revision."
        assert said in refused(capsys, Path(link))
        assert said in fails(
            capsys, "extract", "--shards", inputs / "shards", "--layer", 4, "--sae", link, "--out", inputs / "o"
        )
        assert said in fails(capsys, "convert", link, inputs / "x")
    (inputs / "launched" / "slurm").mkdir(parents=True)
    (inputs / "launched" / "slurm" / "jobs.jsonl").touch()
    assert "launched holds no run yet, only what the launcher wrote. What became of" in refused(capsys, inputs / "launched")
