"""README's examples run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from saev_dist.data.shards import Shards
from saev_dist.store import ARTIFACT_PATTERNS
from tests.ranks import ENV, server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_example_runs_from_top_to_bottom(tmp_path):
    for name in ("tests", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENV['PATH']}"
    assert len(SHELL) == 17
    for at, line in enumerate(SHELL):
        if at and line.startswith("saev-dist "):  # in a fork, but for the first: the others would import torch for minutes
            codes, printed = server().run(*shlex.split(line)[1:], before=f"import os; os.chdir({str(tmp_path)!r})")
            assert codes == [0] and printed, (line, printed)
            continue
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=ENV | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        assert "saev-dist" not in line or done.stdout, line
    done = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True) for code in PYTHON
    ]
    assert [(run.returncode, run.stderr) for run in done] == [(0, "")] * 2
    assert re.match(r"feature \d+ scores [\d.]+ on image \d+, patch \d+", done[0].stdout)
    shards = Shards.open(tmp_path / "runs/my-shards")
    shards.check_files()
    assert (shards.n_examples, shards.n_patches, shards.d_model) == (24, 196, 768)


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    files = [link for link in links if not link.startswith(("http", "#"))]
    assert files and all((ROOT / link).exists() for link in files)
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", README, re.M)}
    assert {link[1:] for link in links if link.startswith("#")} <= headings


@pytest.mark.parametrize("pattern", ARTIFACT_PATTERNS)
def test_every_artifact_is_explained(pattern):
    assert f"`{pattern.replace('*', '99')}`" in README
