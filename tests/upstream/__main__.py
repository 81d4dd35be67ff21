"""SAEs as releases of other programs write them: `python -m tests.upstream [REQUIREMENT ...]`, such as sae-lens==6.54.12.

Each requirement is installed into a virtual environment of its own (about 3 GB and some minutes; it is removed). There
`write_….py` makes SAEs of every kind that the release has, saves each in every way that it has, and encodes tokens with
what the release loads back. Here every one is read, and must give the same features. One whose architecture is refused by
its name counts as known. What this finds becomes a fixture in `tests/data/sae-formats`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from saev_dist.errors import CheckpointError, ConfigError
from saev_dist.sae.model import Sae
from tests.sae_files import encode, expected_in, load

HERE = Path(__file__).parent
WRITERS = {
    "sae-lens": "write_sae_lens.py",
    "dictionary-learning": "write_dictionary_learning.py",
    "eai-sparsify": "write_sparsify.py",
}
RELEASES = ["sae-lens", "sae-lens==5.11.0", "sae-lens==4.4.5", "sae-lens==3.23.4", "dictionary-learning", "eai-sparsify"]
REFUSED = {"abstopk", "matching_pursuit", "temporal"} | {
    f"{before}transcoder" for before in ("", "skip_", "jumprelu_", "jumprelu_skip_")
}
"""Architectures of SAELens that this version does not read."""
NOT_READ = re.compile(r"architecture is '(\w+)'; this version reads")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.upstream", description=__doc__.splitlines()[0])
    parser.add_argument("requirements", nargs="*", default=RELEASES, help="what pip installs; default: some releases of each")
    requirements = parser.parse_args().requirements
    if strangers := [requirement for requirement in requirements if _program(requirement) not in WRITERS]:
        parser.error(f"{', '.join(strangers)}: expected {', '.join(WRITERS)}, and if need be ==RELEASE")
    n_faults = sum(try_release(requirement) for requirement in requirements)
    sys.exit(f"{n_faults} faults" if n_faults else None)


def try_release(requirement: str) -> int:
    """Print the faults, and what became of how many SAEs of a release; return the number of faults."""
    program = _program(requirement)
    with tempfile.TemporaryDirectory() as name:
        dpath = Path(name)
        python = dpath / "venv/bin/python"
        pip = [python, "-m", "pip"]
        for command in (
            [sys.executable, "-m", "venv", dpath / "venv"],
            # What old releases ask for does not go with today's torch; what the newest one asks for does for them, too.
            [*pip, "install", "--quiet", "--constraint", HERE.parent.parent / "constraints.txt", program, "safetensors"],
            [*pip, "install", "--quiet", "--no-deps", requirement],
            # It comes along, and cannot be imported if it was built for another torch.
            [*pip, "uninstall", "--quiet", "--yes", "torchvision"],
            [python, HERE / WRITERS[program], dpath / "saes"],
        ):
            if subprocess.run(command, cwd=dpath).returncode:
                print(f"{requirement}: {' '.join(map(str, command))} failed", flush=True)
                return 1
        count = Counter[str]()
        for path in sorted((dpath / "saes").iterdir()):
            what, _, why = verdict(path).partition(": ")
            count[what] += 1
            if what == "FAULT":
                print(f"{requirement}, {path.name}: {why}")
    print(f"{requirement}: {', '.join(f'{n} {what}' for what, n in count.items())}", flush=True)
    return count["FAULT"] + (not count["same"])


def verdict(path: Path) -> str:
    """What became of one SAE, in a word or two, and of a fault what it is."""
    try:
        sae = _read(path)
    except (CheckpointError, ConfigError) as err:
        architecture = NOT_READ.search(str(err))
        return "refused by name" if architecture and architecture[1] in REFUSED else f"FAULT: {err}"
    x_bd, feats_bs = expected_in(path)
    worst = float(((encode(sae, x_bd) - feats_bs).abs() / (1 + feats_bs.abs())).max())
    return "same" if worst < 1e-5 and feats_bs.any() else f"FAULT: {sae.source}: {worst:.1e} apart"


def _read(path: Path) -> Sae:
    try:
        return load(path)
    except ConfigError:
        if (path / "activation_scaler.json").exists():
            raise
        return load(path, input_scale=1.0)  # SAELens before version 6 saves no scale, and encodes without


def _program(requirement: str) -> str:
    return re.split("[=<>~!]", requirement)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
