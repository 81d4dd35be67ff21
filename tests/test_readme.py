"""README's examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saev_dist.store import ARTIFACT_PATTERNS
from tests.ranks import ENV

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_example_runs_from_top_to_bottom(tmp_path):
    for name in ("tests", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENV['PATH']}"
    assert len(SHELL) == 17
    for line in SHELL:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=ENV | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        assert "saev-dist" not in line or done.stdout, line
    done = subprocess.run([sys.executable, "-c", PYTHON], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert re.match(r"feature \d+ scores [\d.]+ on image \d+, patch \d+", done.stdout), done.stderr


@pytest.mark.parametrize("pattern", ARTIFACT_PATTERNS)
def test_every_artifact_is_explained(pattern):
    assert f"`{pattern.replace('*', '99')}`" in README
