"""What other programs and damaged disks may leave in a file: whatever it is, one line and exit code 1, or a good end."""

import io
import json
import shutil
import struct
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saev_dist.cli import main
from tests.sae_files import DATA
from tests.synthetic import SETTINGS, TOPK, make_acts, make_sae, make_shards

VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, 2**64, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308),
    *("", "x", "7", "../x", "/etc/passwd", "a\nb", "\x1b[31m", "\u202e", "\ud800", "x" * 5000, "topk"),
    *([], {}, [0], [[]], [None], ["x"], [-1], [1, 1], [{}], {"a": 1}),
]
INPUTS = ["--shards", "shards", "--sae", "sae.pt", "--layer", "4", "--out", "new", *SETTINGS]
COMMANDS = {
    "shards/metadata.json": [["inspect", "shards"], ["extract", *INPUTS]],
    "shards/shards.json": [["inspect", "shards"], ["extract", *INPUTS]],
    "sae.pt": [["inspect", "sae.pt"], ["extract", *INPUTS]],
    "plain.safetensors": [["inspect", "plain.safetensors"], ["convert", "plain.safetensors", "new"]],
    "run/manifest.json": [["inspect", "run"], ["verify", "--run", "run", "--no-progress"]],
    "sae_lens/cfg.json": [["inspect", "sae_lens"], ["convert", "sae_lens", "new"]],
    "sae_lens/sae_weights.safetensors": [["inspect", "sae_lens"], ["convert", "sae_lens", "new"]],
    "sparsify/cfg.json": [["inspect", "sparsify"], ["convert", "sparsify", "new"]],
    "dictionary_learning/config.json": [["inspect", "dictionary_learning"], ["convert", "dictionary_learning", "new"]],
    "dictionary_learning/ae.pt": [["inspect", "dictionary_learning"], ["convert", "dictionary_learning", "new"]],
}


def call(*args: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of the program, in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(list(args))
            code = 0
        except SystemExit as ending:
            code = ending.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory with a good file of each name, for which all commands end well."""
    dpath = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dpath)
        make_shards(dpath / "shards", make_acts(5), layers=(9, 4))
        make_sae(dpath / "sae.pt", TOPK)
        for name, source in (("sae_lens", "topk_none_pre"), ("sparsify", "topk"), ("dictionary_learning", "batch_top_k")):
            shutil.copytree(DATA / name / source, name, ignore=shutil.ignore_patterns("expected*"))
        for command in (["extract", *INPUTS, "--out", "run"], ["convert", "sae.pt", "plain.safetensors"]):
            assert call(*command)[0] == 0
        for command in (command for commands in COMMANDS.values() for command in commands):
            assert call(*command)[0] == 0
            shutil.rmtree("new") if Path("new").is_dir() else Path("new").unlink(missing_ok=True)
    return dpath


def spoil_json(draw, content):
    """Replace, remove, double or add a member anywhere."""
    content, places = deepcopy(content), [()]
    for place in places:  # grows
        found = content
        for key in place:
            found = found[key]
        keys = list(found) if isinstance(found, dict) else range(min(len(found), 4)) if isinstance(found, list) else []
        places += [(*place, key) for key in keys]
    *way, last = draw(st.sampled_from(places)) or [None]
    value = deepcopy(draw(st.sampled_from(VALUES)))
    if last is None:
        return value
    holder = content
    for key in way:
        holder = holder[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "replace":
        holder[last] = value
    elif how == "remove":
        del holder[last]
    elif isinstance(holder, list):
        holder.append(deepcopy(holder[last]))
    else:
        holder[draw(st.sampled_from(["", "stranger", "\n", "\u202e"]))] = value
    return content


def spoil(draw, fpath: Path) -> None:
    """Change a file's JSON, or its bytes."""
    content = fpath.read_bytes()

    def dumped(obj) -> bytes:
        return json.dumps(obj).encode("utf-8", "surrogatepass")

    if fpath.name == "ae.pt" or (fpath.suffix != ".json" and draw(st.booleans())):
        end = draw(st.integers(0, len(content)))
        content = content[:end] if draw(st.booleans()) else content[:end] + draw(st.binary(max_size=8)) + content[end + 4 :]
    elif fpath.suffix == ".json":
        content = dumped(spoil_json(draw, json.loads(content)))
    elif fpath.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        rules = header.get("__metadata__", {})
        if "rules" in rules and draw(st.booleans()):
            rules["rules"] = dumped(spoil_json(draw, json.loads(rules["rules"]))).decode("utf-8", "surrogatepass")
        else:
            header = spoil_json(draw, header)
        content = struct.pack("<Q", len(dumped(header))) + dumped(header) + content[8 + size :]
    else:  # saev's
        line, body = content.split(b"\n", 1)
        content = dumped(spoil_json(draw, json.loads(line))) + b"\n" + body
    fpath.write_bytes(content)


@pytest.mark.parametrize("name", COMMANDS)
@given(data=st.data())
@settings(max_examples=60)  # of some hundredths of a second
def test_whatever_a_file_holds_there_is_one_line(name, data, good):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(shutil.copytree(good, Path(folder) / "spoilt"))
        spoil(data.draw, Path(name))
        for command in COMMANDS[name]:
            code, out, err = call(*command)
            lines = [line for line in err.splitlines() if not line.startswith(("saev-dist: warning: ", "self-check: "))]
            errors = [line for line in lines if line.startswith("saev-dist: error: ")]
            assert (code, len(errors)) in ((0, 0), (1, 1)), (command, code, err)
            assert lines == errors, (command, err)
            assert all(line.isprintable() for line in (out + err).splitlines()), (command, out, err)
