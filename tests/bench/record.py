"""What a benchmark gives: one JSON line on stdout, with the commit, the machine and the shapes.

`make bench` gathers the lines in `bench.jsonl`; `python -m tests.bench.record bench.jsonl` makes a table of them.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def emit(
    bench: str,
    what: str,
    shapes: Mapping[str, Any],
    *,
    ceiling: str = "",
    share: float | None = None,
    n_threads: int | None = None,
    **figures: Any,
) -> None:
    """Print the line of one measurement.

    Args:
        bench: module that measured.
        what: what was measured, in a few words.
        shapes: sizes and settings.
        ceiling: what the figure is held against, measured in the same run.
        share: the ceiling's time over the measured time.
        n_threads: that the measured process had; None: as many as this one.
        figures: the numbers.
    """
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    line = {
        "bench": bench,
        "what": what,
        "commit": commit,
        "machine": f"{cpu_model()}, {n_threads or torch.get_num_threads()} threads",
    }
    if share is not None:
        line |= {"share": round(share, 3), "ceiling": ceiling}
    print(json.dumps(line | {"shapes": dict(shapes)} | figures), flush=True)


def cpu_model() -> str:
    """The processor's name, as Linux has it, and its generation, which the names of virtual machines leave out."""
    first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    fields = dict(re.findall(r"^(.+?)\s*: (.+)$", first, re.M))
    name = fields.get("model name", "unknown processor")
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: the measurements that have a ceiling, the last of each kind on each machine."""
    keys = ("bench", "what", "machine", "shapes")
    last = {json.dumps([line[key] for key in keys]): line for line in lines if "share" in line}
    rows = [f"| {line['what']} | {line['share']:.2f} | {line['ceiling']} | {line['machine']} |" for line in last.values()]
    return "\n".join(["| what | share | of | machine |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    print(table([json.loads(line) for line in lines if line.startswith("{")]))  # a run prints its summary there too
