"""What a user can set, by command: frozen dataclasses whose docstrings are the help texts.

A TOML file named by `--config` holds the same fields (`top_k = 64`); flags override it.
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from saev_dist.errors import ConfigError

MAX_COUNT = 10**9
TriState = Annotated[bool | None, tyro.conf.arg(metavar="| --no-pre-bias")]


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Stream stored activations through an SAE once; keep each feature's strongest scores and its statistics.

    Run it alone, or on all GPUs of a node with `torchrun --nproc-per-node 8 -m saev_dist extract …`: the artifacts are
    the same bytes at the same number of CPU threads (OMP_NUM_THREADS). A finished run in --out is left as it is.
    """

    shards: Path
    """Directory of activation shards: metadata.json, shards.json, acts*.bin."""
    sae: Path
    """SAE checkpoint: a saev sae.pt."""
    out: Path
    """Run directory to make or to find finished. All ranks must see it (a shared file system)."""
    config: Path | None = None
    """TOML file of defaults for these flags, such as configs/cpu.toml."""

    layer: int | None = None
    """Layer, as a value out of the metadata's "layers". Needed only when the shards hold several."""
    pre_bias: TriState = None
    """Subtract b_dec from the activations before encoding, or do not. Default: as the checkpoint's format says (saev: no; its files trained before 2025-07-31 need --pre-bias)."""
    top_k: int = 128
    """Slots per feature."""
    rank_by: Literal["patch", "image"] = "patch"
    """patch: rank every patch, so an image may hold several slots. image: only an image's best patch, so slots are distinct images."""
    percentile: float = 99.0
    """Percentile of each feature's scores over all tokens, zeros included."""
    percentile_estimator: Literal["histogram", "saev"] = "histogram"
    """histogram: within 3.1 % of the true one, any number of ranks. saev: its running sign-step estimate, for comparison; one process only."""
    n_distributions: int = 25
    """The first so many features have their values on all tokens kept in distributions.pt."""
    max_distribution_samples: int = 1_048_576
    """Most tokens in distributions.pt; of more tokens an even stride is taken."""
    img_acts: bool = True
    """Write img_acts.npz (per image and feature). Its size grows with the images: turn it off where only slots are wanted."""
    metrics: bool = False
    """Also measure the reconstruction error (normalized MSE) over all tokens. Reads one decoder row per code."""

    batch_tokens: int = 16_384
    """Tokens per batch, rounded down to whole images, at least one image. Part of what the bytes depend on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs. auto: a GPU if there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the encoder's product. tf32 needs CUDA; bf16 rounds scores to 8 bits."""
    read_ahead: int = 3
    """Batches read ahead of the encoder, each in its own buffer."""
    timeout_s: int = 600
    """Longest that a rank waits for the others inside one collective operation."""

    dry_run: bool = False
    """Print the plan and what it needs (host, device, disk), then stop."""
    force: bool = False
    """Compute again what --out already holds, or replace another run's artifacts there."""
    progress: bool = True
    """Show progress: a bar on a terminal, a line every 30 s elsewhere."""

    def __post_init__(self) -> None:
        for name in ("top_k", "max_distribution_samples", "batch_tokens", "read_ahead", "timeout_s"):
            if not 1 <= getattr(self, name) <= MAX_COUNT:
                raise ConfigError(f"{name} must be at least 1 (and at most {MAX_COUNT:,}), got {getattr(self, name)}.")
        if self.n_distributions < 0:
            raise ConfigError(f"n_distributions must not be negative, got {self.n_distributions}.")
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"percentile must lie in 0 to 100, got {self.percentile:g}.")


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a shards directory, an SAE checkpoint or a run directory, and check it: sizes, NaN in a sample, shapes."""

    path: Annotated[Path, tyro.conf.Positional]
    """A shards directory, an SAE checkpoint, or a run directory of `extract`."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole pipeline in about a minute, with no download: photographs, activations, a small SAE, extract, a picture."""

    out: Path = Path("saev-demo")
    """Directory to make: images/, shards/, sae.pt, run/ and the contact sheet."""
    seed: int = 0
    """Seed of the SAE's training."""
    n_steps: int = 1000
    """Steps of the SAE's training, each on 1,024 tokens."""
    force: bool = False
    """Make everything again where --out holds a finished demo."""
    progress: bool = True
    """Show progress."""

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise ConfigError(f"n_steps must be at least 1, got {self.n_steps}.")


def toml_flags(fpath: Path, command: type) -> list[str]:
    """The fields in a TOML file as command-line flags, to be put before the user's own.

    Args:
        fpath: file whose top level holds fields of `command`, by name.
        command: the dataclass.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds a field that `command` lacks.
    """
    try:
        table: dict[str, Any] = tomllib.loads(fpath.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{fpath}: {err.strerror}; --config takes a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{fpath} is not TOML: {err}.") from None
    known = [field.name for field in fields(command) if field.name != "config"]
    flags: list[str] = []
    for name, value in table.items():
        if name not in known:
            raise ConfigError(
                f"{fpath} sets {name!r}, which {command.__name__.lower()} does not know; it knows {', '.join(known)}."
            )
        flag = name.replace("_", "-")
        match value:
            case bool():
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            case str() | int() | float():
                flags += [f"--{flag}", str(value)]
            case _:
                raise ConfigError(f"{fpath}: {name} is {value!r}; expected a string, a number or true/false.")
    return flags
