"""From a command's flags to its runs: one config each, also where a flag or a TOML file names several inputs."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from saev_dist.cli import parse_flags, with_toml
from saev_dist.config import Extract, Replay, SaeRules, spellings
from saev_dist.errors import ConfigError, RunError
from saev_dist.fields import Fields
from saev_dist.files import refuse_lacking
from saev_dist.sae.hub import absolute

C = TypeVar("C", Extract, Replay)
AXES: dict[type, tuple[str, ...]] = {Extract: ("shards", "sae"), Replay: ("run",)}
# What the job itself finds out, or what changes no artifact: the rest of a manifest's identity is the config's own.
FOUND_OUT = ("layer", "device")


def configs(command: type[C], flags: list[str]) -> list[C]:
    """The config of each run that `flags` and their TOML file describe; every input of one crossed with every other.

    With several inputs `--out` is the directory that holds the runs, each named by what tells its inputs apart. A run that is
    there already keeps its name, whatever other inputs there are now.

    Raises:
        ConfigError: two inputs are the same, a flag of several values is given twice, or the TOML file is wrong.
    """
    flags = with_toml(flags, command, lists=AXES[command])
    inputs: dict[str, list[str]] = {}  # by axis
    for name in AXES[command]:
        values, flags = _take(flags, spellings(name))
        if values:
            inputs[name] = values
    given: list[str] = []
    for name, values in inputs.items():
        given += [f"--{name}={values[0]}"]
    first: Any = parse_flags([command.__name__.lower(), *flags, *given], prog="python -m slurm.launch")
    combinations = [
        dict(zip(inputs, paths, strict=True)) for paths in product(*([Path(v) for v in vs] for vs in inputs.values()))
    ]
    if len(combinations) == 1:
        return [_absolute(first)]
    if command is Replay:
        return [_absolute(replace(first, **paths)) for paths in combinations]
    labels = {name: dict(zip(map(Path, values), _labels(values), strict=True)) for name, values in inputs.items()}
    there = _runs_in(first.out)
    names = []
    for paths in combinations:
        name = "-".join(labels[axis][path] for axis, path in paths.items() if len(inputs[axis]) > 1)
        cfg = _absolute(replace(first, **paths))
        same = [former for former, record in there[str(cfg.sae), str(cfg.shards)] if _is_of(cfg, record)]
        names.append(name if name in same or not same else same[0])
    if len(set(names)) < len(names):
        raise ConfigError(f"these inputs would share a run directory: {', '.join(names)}. Launch them one by one.")
    return [_absolute(replace(first, out=first.out / name, **paths)) for name, paths in zip(names, combinations, strict=True)]


def run_dpath(cfg: Extract | Replay) -> Path:
    return cfg.out if isinstance(cfg, Extract) else cfg.run


def is_finished(cfg: Extract | Replay) -> bool:
    """Whether an extract need not be launched: its manifest is there, of these settings, younger than SAE and shards.

    Anything else is left to the job, which compares contents and refuses another run's directory.

    Raises:
        RunError: so it is, but an artifact is gone.
    """
    if isinstance(cfg, Replay) or cfg.force or os.path.exists(cfg.out / "partials" / "run.json"):
        return False
    manifest_fpath = cfg.out / "manifest.json"
    try:
        manifest = json.loads(manifest_fpath.read_bytes())
        wrote = manifest_fpath.stat().st_mtime
        inputs = [cfg.sae, *(cfg.shards / name for name in ("metadata.json", "shards.json"))]
        if not cfg.sae.is_file():  # a directory's own time does not tell when its files were written
            inputs += cfg.sae.iterdir()
        inputs += [cfg.input_mean] if cfg.input_mean else []
        if any(fpath.stat().st_mtime > wrote for fpath in inputs):
            return False
    except (OSError, ValueError):
        return False
    if not _is_of(cfg, manifest):
        return False
    refuse_lacking(cfg.out, Fields(manifest, str(manifest_fpath), RunError))
    return True


def _take(flags: Sequence[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The values after the last of these flags, and the flags without any of them."""
    values: list[str] = []
    rest: list[str] = []
    taking = False
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--") and name.replace("_", "-") in names:
            taking, values = not equals, [value] if equals else []
        elif taking and not word.startswith("--") and word != "-h":
            values.append(word)
        else:
            taking = False
            rest.append(word)
    if len(set(values)) < len(values):
        raise ConfigError(f"{names[0]} names {max(values, key=values.count)} twice.")
    return values, rest


def _runs_in(dpath: Path) -> dict[tuple[str, str], list[tuple[str, Any]]]:
    """The runs in a directory, finished or not, by SAE and shards: the name of each, and what it says of itself."""
    found: dict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
    for fpath in sorted([*dpath.glob("*/manifest.json"), *dpath.glob("*/partials/run.json")]):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the job itself will say what is wrong there
            record = json.loads(fpath.read_bytes())
            made_with = record["config"]
            found[made_with["sae"], made_with["shards"]].append((fpath.relative_to(dpath).parts[0], record))
    return found


def _is_of(cfg: Extract, record: Any) -> bool:
    """Whether a manifest.json or run.json is of this config, as far as can be told without opening its inputs."""
    try:
        identity, made_with = record["identity"], record["config"]
        settings = json.loads(json.dumps(asdict(cfg), default=str))
        same = all(settings[name] == identity[name] for name in identity.keys() & settings.keys() - set(FOUND_OUT))
        # The rules as they were asked for; the identity has what came of them.
        asked = all(
            settings[name] == made_with[name] for name in ("sae", "shards", *(field.name for field in fields(SaeRules)))
        )
        return same and asked and settings["layer"] in (None, identity["layer"])
    except (KeyError, TypeError, AttributeError):
        return False


def _labels(values: list[str]) -> list[str]:
    """What tells paths apart: their parts without those that all begin or end with."""
    parts = [list(Path(os.path.normpath(Path(value.removesuffix(".pt")).absolute())).parts) for value in values]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({path[end] for path in parts}) == 1:
            for path in parts:
                del path[end]
    return ["-".join(path).replace(os.sep, "") or "root" for path in parts]


def _absolute(cfg: Any) -> Any:
    """The config with paths that hold wherever the job starts; hf://owner/repo is none."""
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return replace(cfg, **{name: absolute(path) for name, path in values.items() if isinstance(path, Path)})
