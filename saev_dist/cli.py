"""The program: subcommands, their flags from `config`, one-line errors and exit codes."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from saev_dist import __version__
from saev_dist.config import Demo, Extract, Inspect, Replay, Verify, toml_flags
from saev_dist.errors import PeerError, SaevDistError

# The modules are imported on use: `--help` should not wait for torch.
JOBS: dict[str, tuple[type, str]] = {
    "extract": (Extract, "saev_dist.extract"),
    "replay": (Replay, "saev_dist.replay"),
    "verify": (Verify, "saev_dist.verify"),
    "inspect": (Inspect, "saev_dist.inspect"),
    "demo": (Demo, "saev_dist.demo"),
}

DESCRIPTION = """Find out what each feature of a sparse autoencoder means, from stored vision-transformer activations.

Start with `saev-dist demo`: a minute on a laptop, from photographs to a picture of features.
Then `saev-dist inspect` on your shards and your SAE, and `saev-dist extract`."""


def main(argv: list[str] | None = None) -> None:
    """Parse, run, and exit: 0 done, 1 an error that the user can mend, 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"saev-dist {__version__}")
        return
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        try:
            cfg = parse(argv, quiet=not is_first)
        except SaevDistError as err:
            if not is_first:  # every rank reads the same flags
                raise PeerError(str(err)) from err
            raise
        job: Callable[[Any], None] = import_module(dict(JOBS.values())[type(cfg)]).run
        job(cfg)
    except PeerError:
        sys.exit(1)  # the rank that failed first has said why
    except SaevDistError as err:
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"saev-dist: error: {rank}{err}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("saev-dist: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def parse(argv: list[str], *, quiet: bool = False) -> Any:
    """The config that `argv` (without the program's name) and its TOML file describe.

    Args:
        argv: subcommand and flags.
        quiet: print nothing on wrong usage: rank 0 does.
    """
    if argv and argv[0] in JOBS:
        command, _ = JOBS[argv[0]]
        flags = _tri_state(argv[1:])
        if (fpath := _config_path(flags)) is not None:
            flags = _tri_state(toml_flags(fpath, command)) + flags
        argv = [argv[0], *flags]
    return tyro.extras.subcommand_cli_from_dict(
        {name: command for name, (command, _) in JOBS.items()},
        prog="saev-dist",
        description=DESCRIPTION,
        args=argv,
        console_outputs=not quiet,
        config=(tyro.conf.AvoidSubcommands,),
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


def _tri_state(flags: list[str]) -> list[str]:
    """Spell --pre-bias and --no-pre-bias as tyro reads a flag that can also be unset."""
    words = {"--pre-bias": ["--pre-bias", "True"], "--no-pre-bias": ["--pre-bias", "False"]}
    return [word for flag in flags for word in words.get(flag, [flag])]
