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
from tests.sae_files import encode, expected_in, load

HERE = Path(__file__).parent
WRITERS = {
    "sae-lens": "write_sae_lens.py",
    "dictionary-learning": "write_dictionary_learning.py",
    "eai-sparsify": "write_sparsify.py",
}
RELEASES = ["sae-lens", "sae-lens==5.11.0", "sae-lens==4.4.5", "sae-lens==3.23.4", "dictionary-learning", "eai-sparsify"]
REFUSED_BY_NAME = re.compile(r"architecture is '\w+'; this version reads")
NEEDS_A_NUMBER = "leaves out a number that its encoder needs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requirements", nargs="*", default=RELEASES, help="what pip installs; default: some releases of each")
    n_faults = sum(try_release(requirement) for requirement in parser.parse_args().requirements)
    sys.exit(f"{n_faults} faults" if n_faults else None)


def try_release(requirement: str) -> int:
    """Print the faults, and what became of how many SAEs of a release; return the number of faults."""
    program = re.split("[=<>]", requirement)[0]
    writer = HERE / WRITERS[program]
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
            [python, writer, dpath / "saes"],
        ):
            subprocess.run(command, check=True, cwd=dpath)
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
        sae = load(path)
    except (CheckpointError, ConfigError) as err:
        if REFUSED_BY_NAME.search(str(err)):
            return "refused by name"
        if NEEDS_A_NUMBER in str(err):
            return "needs a scale"
        return f"FAULT: {err}"
    x_bd, feats_bs = expected_in(path)
    worst = float(((encode(sae, x_bd) - feats_bs).abs() / (1 + feats_bs.abs())).max())
    return "same" if worst < 1e-5 and feats_bs.any() else f"FAULT: {sae.source}: {worst:.1e} apart"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
