"""The program: subcommands, their flags from `config`, one-line errors and exit codes."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from saev_dist import __version__
from saev_dist.config import Convert, Demo, Extract, Inspect, Merge, Replay, Verify, refuse_repeated, toml_flags
from saev_dist.errors import ConfigError, PeerError, Preempted, SaevDistError, of_file, rank_prefix, tell
from saev_dist.output import printing, spare_output
from saev_dist.signals import be_deaf

# A store that dies or is not there makes torch print C++ stack traces beside our one line; it reads this when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

# The modules are imported on use: `--help` should not wait for torch.
JOBS: dict[str, tuple[type, str]] = {
    "extract": (Extract, "saev_dist.extract"),
    "replay": (Replay, "saev_dist.replay"),
    "verify": (Verify, "saev_dist.verify"),
    "merge": (Merge, "saev_dist.merge"),
    "inspect": (Inspect, "saev_dist.inspect"),
    "convert": (Convert, "saev_dist.convert"),
    "demo": (Demo, "saev_dist.demo"),
}

MAKERS = (Extract, Replay, Merge, Convert)
"""What they are for is files, not what they print."""
ALONE = (Merge, Inspect, Convert, Demo)
"""One process each."""
LAUNCHERS = ("pipeline", "status", "cancel")
"""Commands of `slurm.launch`, which are none here."""

DESCRIPTION = """Find out what each feature of a sparse autoencoder means, from stored vision-transformer activations.

Start with `saev-dist demo`: a minute on a laptop, from photographs to a picture of features.
Then `saev-dist inspect` on your shards and your SAE, and `saev-dist extract`. `saev-dist --version` says which it is."""


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and exit: 0 done, 1 an error that the user can mend, 2 wrong usage, 75 (EX_TEMPFAIL)
    stopped by a signal and to be run again, 130 interrupted where there was nothing to keep."""
    argv = sys.argv[1:] if argv is None else argv
    is_first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    try:
        with printing():
            if argv == ["--version"]:
                print(f"saev-dist {__version__}")
                return
            try:
                cfg = parse(argv, quiet=not is_first)
            except SaevDistError as err:
                if not is_first and not isinstance(err.__cause__, OSError):  # a file may be missing on one node alone
                    raise PeerError(str(err)) from err
                raise
            if not sys.platform.startswith("linux"):
                raise ConfigError(f"saev-dist runs on Linux; this is {sys.platform}. Use a container, or another machine.")
            if isinstance(cfg, ALONE) and "RANK" in os.environ and (n_ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
                if not is_first:
                    raise PeerError("rank 0 says it")
                raise ConfigError(f"{argv[0]} is one process; there are {n_ranks}. Start it without torchrun.")
            try:
                os.getcwd()  # without one torch finds none of its libraries, and dies
            except FileNotFoundError:
                raise ConfigError("the working directory is gone; change to one that is there.") from None
            if isinstance(cfg, MAKERS) and not getattr(cfg, "dry_run", False):
                spare_output()
            job: Callable[[Any], None] = import_module(dict(JOBS.values())[type(cfg)]).run
            with import_module("saev_dist.machine").allocating():
                job(cfg)
    except Preempted as err:
        be_deaf()
        if is_first:
            tell(f"saev-dist: {err}")
        sys.exit(os.EX_TEMPFAIL)
    except PeerError:
        sys.exit(1)  # the rank that failed first has said why
    except (SaevDistError, OSError) as err:
        tell(f"saev-dist: error: {rank_prefix()}{of_file(err) if isinstance(err, OSError) else err}")
        sys.exit(1)
    except KeyboardInterrupt:
        tell("saev-dist: interrupted")
        sys.exit(130)


def parse(argv: list[str], *, quiet: bool = False) -> Any:
    """The config that `argv` (without the program's name) and its TOML file describe.

    Args:
        argv: subcommand and flags.
        quiet: print nothing on wrong usage: rank 0 does.
    """
    if argv and argv[0] in JOBS:
        argv = [argv[0], *with_toml(argv[1:], JOBS[argv[0]][0])]
    return parse_flags(argv, quiet=quiet)


def with_toml(flags: list[str], command: type, *, lists: tuple[str, ...] = ()) -> list[str]:
    """The flags, after those in the TOML file that the last --config among them names.

    Args:
        lists: fields that may have several values although their flag takes one: a launcher's sweep.

    Raises:
        ConfigError: the TOML file is wrong, or a flag of several values is given twice.
    """
    refuse_repeated(flags, command, lists=lists)
    names = {field.name for field in fields(command)}
    if "config" in names and (fpath := _config_path(flags)) is not None:
        return toml_flags(fpath, command, lists=lists) + flags
    return flags


def parse_flags(argv: list[str], *, quiet: bool = False, prog: str = "saev-dist") -> Any:
    """The config that subcommand and flags describe, with no look at a TOML file."""
    if argv and argv[0] in LAUNCHERS:
        if not quiet:
            print(f"{prog}: {argv[0]!r} is a command of the launcher: python -m slurm.launch {argv[0]} --help", file=sys.stderr)
        sys.exit(2)
    if argv and argv[0] not in JOBS and (near := get_close_matches(argv[0], JOBS, 1, cutoff=0.7)):
        if not quiet:
            print(f"{prog}: {argv[0]!r} is no command: did you mean {near[0]!r}?", file=sys.stderr)
        sys.exit(2)
    config = (tyro.conf.AvoidSubcommands,)
    if argv and argv[0] in JOBS:  # by itself: then tyro's errors name the command whose help they send to
        command, prog = JOBS[argv[0]][0], f"{prog} {argv[0]}"
        return tyro.cli(command, prog=prog, args=_spelled(argv[1:]), console_outputs=not quiet, config=config)
    return tyro.extras.subcommand_cli_from_dict(
        {name: command for name, (command, _) in JOBS.items()},
        prog=prog,
        description=DESCRIPTION,
        args=argv,
        console_outputs=not quiet,
        config=config,
    )


def _config_path(flags: list[str]) -> Path | None:
    """The value of the last --config."""
    found = None
    for i, flag in enumerate(flags):
        if flag == "--config" and i + 1 < len(flags):
            found = Path(flags[i + 1])
        elif flag.startswith("--config="):
            found = Path(flag.removeprefix("--config="))
    return found


def _spelled(flags: list[str]) -> list[str]:
    """As tyro reads them: --pre-bias and --no-pre-bias, a flag that can also be unset, and --features 3,17 with its commas."""
    words = {"--pre-bias": ["--pre-bias", "True"], "--no-pre-bias": ["--pre-bias", "False"]}
    spelled: list[str] = []
    is_features = False
    for flag in flags:
        name, equals, numbers = flag.partition("=")
        is_features = name == "--features" or (is_features and not flag.startswith("--"))
        if is_features and "," in flag and re.fullmatch(r"[\d,]+", numbers if equals else flag):
            spelled += [name] * bool(equals) + [number for number in (numbers if equals else flag).split(",") if number]
        else:
            spelled += words.get(flag, [flag])
    return spelled
