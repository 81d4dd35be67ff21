"""What a user can set, by command: frozen dataclasses whose docstrings are the help texts.

A TOML file named by `--config` holds the same fields (`top_k = 64`); flags override it.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from saev_dist.errors import ConfigError

T = TypeVar("T")

MAX_COUNT = 10**9
ALIASES = {"run": ("--run-dir",)}
RunPath = Annotated[Path, tyro.conf.arg(aliases=ALIASES["run"])]


def _one(kind: type[Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """A value of a flag that can be left out. tyro's own would take the word "None", and speak of it."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


# What is None or empty by default: help shows the type alone, and the text says what that means.
UNSET = tyro.conf.arg(help_behavior_hint="")
OptionalPath = Annotated[Path | None, _one(Path, "PATH"), UNSET]
OptionalText = Annotated[str | None, _one(str, "STR"), UNSET]
OptionalInt = Annotated[int | None, _one(int, "INT"), UNSET]
OptionalFloat = Annotated[float | None, _one(float, "FLOAT"), UNSET]
Ints = Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")]
TriState = Annotated[bool | None, tyro.conf.arg(metavar="| --no-pre-bias", help_behavior_hint="")]
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]


@dataclass(frozen=True, kw_only=True)
class SaeRules:
    """How an SAE is read: what its file says, unless a flag says otherwise."""

    sae_format: Literal["auto", "saev", "plain", "sae_lens", "sparsify", "dictionary_learning"] = "auto"
    """Format of the SAE. auto: told by its content."""
    pre_bias: TriState = None
    """Whether b_dec is subtracted from the activations before encoding. Default: as the checkpoint says (saev: no; its files trained before 2025-07-31, and some Matryoshka ones after, need --pre-bias)."""
    activation: OptionalText = None
    """relu, or topk:K (such as topk:32), in place of what the checkpoint says."""
    threshold: OptionalFloat = None
    """Threshold of a BatchTopK or JumpReLU SAE, one for all features, in place of the checkpoint's: scores at or below it, or 0, are 0."""
    input_norm: Annotated[
        Norm | None, tyro.conf.arg(metavar="{none,layer_norm,constant_norm_rescale}", help_behavior_hint="")
    ] = None
    """Normalisation of each token before encoding, in place of what the checkpoint says."""
    input_mean: OptionalPath = None
    """File with a vector (.npy, .pt, .safetensors) that is subtracted from the activations first: the mean of the SAE's training data."""
    input_scale: OptionalFloat = None
    """Factor of the activations, applied after the mean is subtracted. Where training divided by s, give 1/s."""

    def __post_init__(self) -> None:
        for name in ("threshold", "input_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name} must be finite, got {value}.")
        if self.input_scale == 0:
            raise ConfigError("input_scale must not be 0.")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What `extract` is told beside the SAE's rules."""

    shards: Path
    """Directory of activation shards: metadata.json, shards.json, acts*.bin."""
    sae: Path
    """SAE checkpoint: a saev sae.pt, a directory of SAELens, sparsify or dictionary_learning, a file of `saev-dist convert`, or hf://owner/repo[/path][@revision]."""
    out: Path
    """Run directory to make, to continue, or to find finished. All ranks must see it (a shared file system)."""
    config: OptionalPath = None
    """TOML file of defaults for these flags, such as configs/cpu.toml."""

    layer: OptionalInt = None
    """Layer, as a value out of the metadata's "layers". Needed only when the shards hold several."""
    top_k: int = 128
    """Slots per feature: how many of its strongest patches are kept; with --rank-by image, of its strongest images."""
    rank_by: Literal["patch", "image"] = "patch"
    """patch: rank every patch, so an image may hold several slots. image: only an image's best patch, so slots are distinct images."""
    percentile: float = 99.0
    """Percentile of each feature's scores over all tokens, zeros included; 0 to 100."""
    percentile_estimator: Literal["histogram", "saev"] = "histogram"
    """histogram: within 3.1 % of the true one for scores in 2^-16 to 2^16, any number of ranks. saev: its running sign-step estimate, for comparison; one process only."""
    n_distributions: int = 25
    """Keep the values of the first N features on all tokens in distributions.pt."""
    max_distribution_samples: int = 1_048_576
    """Most tokens in distributions.pt; of more tokens an even stride is taken."""
    img_acts: bool = True
    """Write img_acts.npz (per image and feature). Its size grows with the images: turn it off where only slots are wanted."""
    self_check: Literal["off", "warn", "strict"] = "warn"
    """Before the stream, try the SAE on some thousand tokens under other readings too. warn: say so where one of them reconstructs clearly better, or the SAE no better than the mean activation. strict: stop then."""
    metrics: bool = False
    """Also measure the reconstruction error (normalized MSE) over all tokens. Reads one decoder row per code: on the CPU 8 µs (AMD Zen 5) or 25 µs (Zen 3) of one core per token at d_model 1,024 and 32 codes."""

    batch_tokens: int = 16_384
    """Tokens per batch, rounded down to whole images, at least one image. The last bits of the artifacts may depend on it: another number makes another run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs. auto: a GPU if there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the encoder's product. tf32 needs CUDA; bf16 rounds scores to 8 bits."""
    screen: Literal["none", "bf16"] = "none"
    """bf16: make the product in bfloat16 first, and in fp32 only where a code may be: no code is missed, every score is an fp32 one. On CPUs with AMX, or AMD's with AVX-512 BF16, 1.3 to 1.8 times as fast at 30 codes a token, 1.1 to 1.5 times at 300, slower at thousands. A warning says where the processor is too slow for it; none says that a token has too many codes."""
    read_ahead: int = 3
    """Buffers read ahead of the encoder: a batch each, or several of small shards."""
    timeout_s: int = 600
    """Seconds that the ranks have to meet at the start, and that one exchange of the merge may take. In between they may be hours apart."""
    snapshot_every: float = 300.0
    """Seconds from one snapshot of a rank's work to the next; 0: one after every batch. A kill costs at most the work since the last one."""
    skip_bad_shards: bool = False
    """Leave out shards that are missing or too short, and batches that cannot be read, instead of stopping; the manifest and the summaries say which. NaN or infinity stops the run all the same."""

    dry_run: bool = False
    """Print the plan and what it needs (host, device, disk), then stop."""
    force: bool = False
    """Start over: compute again what --out already holds, or replace another run there. A restart by torchrun or Slurm continues."""
    progress: bool = True
    """Show progress: a bar on a terminal, a line every 30 s elsewhere."""


# Fields come from the last base on, so that help begins with what must be given.
@dataclass(frozen=True, kw_only=True)
class Extract(SaeRules, Extraction):
    """Stream stored activations through an SAE once; keep each feature's strongest scores and its statistics.

    Run it alone, or on all GPUs of a node with `torchrun --nproc-per-node 8 -m saev_dist extract …`: the artifacts are
    the same bytes. If it is killed, or stopped by a signal (exit code 75), the same command continues, with any number of
    ranks. A finished run in --out is left as it is.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts(self, "top_k", "max_distribution_samples", "batch_tokens", "read_ahead", "timeout_s")
        if self.n_distributions < 0:
            raise ConfigError(f"n_distributions must not be negative, got {self.n_distributions}.")
        if not 0 <= self.snapshot_every < math.inf:
            raise ConfigError(f"snapshot_every must be a number of seconds, 0 or more, got {self.snapshot_every:g}.")
        if self.screen != "none" and self.precision != "fp32":
            raise ConfigError(f"--screen {self.screen} gives fp32 scores; it does not go with --precision {self.precision}.")
        if self.percentile_estimator == "saev" and self.skip_bad_shards:
            raise ConfigError(
                "--percentile-estimator saev walks through all tokens in order; it does not go with --skip-bad-shards. Use the "
                "histogram, or repair the shards."
            )
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"percentile must lie in 0 to 100, got {self.percentile:g}.")


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """What commands are told that work on a run of `extract`."""

    run: RunPath
    """Run directory of a finished `extract`. Under torchrun write --run-dir: torchrun takes --run for an option of its own."""
    shards: OptionalPath = None
    """Where the run's shards are now, if they have moved."""
    sae: OptionalPath = None
    """Where the run's SAE is now, if it has moved: a path, or hf://owner/repo[/path][@revision] on another machine than the one that fetched it."""


@dataclass(frozen=True, kw_only=True)
class Replay(OfRun):
    """Draw what features mean: encode once more the images that won slots, check their scores, and write a gallery.

    Opens in a browser from the disk: <run>/visuals/index.html. Run it alone or under torchrun; the files are the same.
    If it is killed, the same command goes on with the pictures that are missing.
    """

    images: OptionalPath = None
    """Pictures: class folders as torchvision's ImageFolder reads them, a flat folder (sorted by name), or a Hugging Face data set saved to disk; matched to the shards by their order alone. Default: the dataset path in the shards' metadata, if it exists."""
    pictures: bool = True
    """Draw on the pictures. --no-pictures draws heatmaps on a plain ground."""
    config: OptionalPath = None
    """TOML file of defaults for these flags."""

    features: Ints = ()
    """Features that are shown whatever the other rules say; with --n-features 0 they alone."""
    n_features: int = 400
    """How many of the features in the ranges below to show besides."""
    sort: Literal["random", "freq", "mean", "max"] = "random"
    """Which of them: a seeded random sample, or the first by frequency, mean or largest score."""
    all: bool = False
    """Show every feature that ever fired, whatever the ranges."""
    log_freq_range: tuple[float, float] = (-6.0, 1.0)
    """Range of log10 of the share of tokens on which a feature fires."""
    log_value_range: tuple[float, float] = (-3.0, 3.0)
    """Range of log10 of a feature's mean over those tokens."""
    seed: int = 0
    """Seed of the random sample."""
    n_images: int = 12
    """Strongest distinct images per feature; fewer where its slots lie in fewer, as they may unless extract ranked by image."""

    fit: Literal["auto", "grid", "crop"] = "auto"
    """How pictures were prepared for the model. grid: resized to whole patches at about their own aspect. crop: resized to --resize, then the middle --crop; the sizes by default are saev's, those of open_clip stand under --resize. auto: crop for clip and siglip, and for dinov2 where it gives the shards' number of patches; grid for others."""
    patch_size: OptionalInt = None
    """Edge of a patch in px. Default: 16 for grid; for crop what gives the shards' number of patches."""
    grid: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="INT INT", help_behavior_hint="")] = None
    """Columns and rows of patches, for --fit grid, where the aspect of the pictures does not tell."""
    resize: tuple[int, int] = (256, 256)
    """Width and height before the crop, px. open_clip's own transform of CLIP is --fit crop --resize 224 224 --keep-aspect, that of SigLIP --fit crop --resize 224 224."""
    crop: tuple[int, int] = (224, 224)
    """Width and height of the crop, px."""
    keep_aspect: bool = False
    """Resize the shorter side to --resize (give one number twice) and keep the aspect, then crop."""
    img_scale: float = 1.0
    """Pixels shown per pixel that the model saw: 2 shows sharper pictures."""
    image_format: Literal["webp", "png"] = "webp"
    """webp: small. png: exact."""
    quality: int = 80
    """Of WebP, 0 to 100. On a plain ground it loses nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs. auto: a GPU if there is one."""
    workers: OptionalInt = None
    """Processes that draw, per rank. Default: half of the cores that the rank has."""
    read_ahead: int = 16
    """Images read ahead of the encoder."""
    timeout_s: int = 600
    """Seconds that the ranks have to meet at the start."""
    dry_run: bool = False
    """Say what would be drawn, and about what it takes on the disk, then stop."""
    force: bool = False
    """Draw again what is there already. A restart by torchrun or Slurm goes on with what was being drawn."""
    progress: bool = True
    """Show progress: a bar on a terminal, a line every 30 s elsewhere."""

    def __post_init__(self) -> None:
        _check_counts(self, "n_images", "read_ahead", "timeout_s")
        if self.images is not None and not self.pictures:
            raise ConfigError("--images names the pictures to draw on; it does not go with --no-pictures. Leave one out.")
        for name in ("patch_size", "workers"):
            if getattr(self, name) is not None:
                _check_counts(self, name)
        for name in ("n_features", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("resize", "crop", "grid"):
            if min(getattr(self, name) or (1,)) < 1:
                raise ConfigError(f"{name} must be two numbers of at least 1, got {getattr(self, name)}.")
        if not 0 < self.img_scale <= 64:
            raise ConfigError(f"img_scale must be above 0 and at most 64, got {self.img_scale:g}.")
        if not 0 <= self.quality <= 100:
            raise ConfigError(f"quality must lie in 0 to 100, got {self.quality}.")


@dataclass(frozen=True, kw_only=True)
class Verify(OfRun):
    """Encode once more the patches that won slots, and compare every stored score of a sample of features. Exit code 1 on a mismatch."""

    features: Ints = ()
    """Features that are checked in any case; with --n-features 0 they alone."""
    n_features: int = 100
    """How many others, a seeded random sample of those that fired."""
    all: bool = False
    """Check every feature that fired."""
    seed: int = 0
    """Seed of the sample."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs. auto: a GPU if there is one."""
    read_ahead: int = 16
    """Images read ahead of the encoder."""
    timeout_s: int = 600
    """Seconds that the ranks have to meet at the start."""
    progress: bool = True
    """Show progress: a bar on a terminal, a line every 30 s elsewhere."""

    def __post_init__(self) -> None:
        _check_counts(self, "read_ahead", "timeout_s")
        for name in ("n_features", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Merge(OfRun):
    """Make the artifacts of an unfinished `extract` whose batches are all done, in one process, and encode nothing."""

    run: RunPath
    """Run directory of an `extract` that died after its last batch."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` is told beside the SAE's rules."""

    path: Annotated[Path, tyro.conf.Positional]
    """A shards directory, an SAE (as `extract --sae` takes it), or a run directory of `extract`."""
    shards: OptionalPath = None
    """Shards to try an SAE on: how well it gives their activations back, as it is read and under other readings."""
    layer: OptionalInt = None
    """With --shards: the layer to try the SAE on, needed where they hold several. Where PATH is shards: the layer to look at; default: every one."""


@dataclass(frozen=True, kw_only=True)
class Inspect(SaeRules, Inspection):
    """Describe a shards directory, an SAE checkpoint or a run directory, and check it: sizes, NaN in a sample, shapes."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` is told beside the SAE's rules."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """SAE to read, as `extract --sae` takes it."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """File to write, such as sae.safetensors."""
    force: bool = False
    """Replace TARGET, if it is there."""


@dataclass(frozen=True, kw_only=True)
class Convert(SaeRules, Conversion):
    """Write an SAE of any known format as one safetensors file that states its rules; flags override how it is read."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole pipeline in about a minute, with no download: photographs, activations, a small SAE, extract, replay, a gallery."""

    out: Path = Path("saev-demo")
    """Directory to make: images/, shards/, sae.pt, run/ with the gallery in run/visuals/, and a contact sheet."""
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
        if not -(2**63) <= self.seed < 2**64:  # torch's own bounds
            raise ConfigError(f"seed must be a number of 64 bits (-2^63 to 2^64 - 1), got {self.seed}.")


def from_json(command: type[T], content: dict[str, Any]) -> T:
    """The config that `dataclasses.asdict` and JSON made `content` of, paths as text.

    Raises:
        ConfigError: a field is not known, or missing.
    """
    hints = get_type_hints(command)
    for name, value in content.items():
        if name in hints and not _is_a(value, hints[name]):
            raise ConfigError(
                f"these are no settings of this version's {command.__name__.lower()}: {name} is {value!r}; expected "
                f"{_expected(hints[name])}."
            )
    values = {
        name: Path(value) if isinstance(value, str) and hints.get(name) in (Path, Path | None) else value
        for name, value in content.items()
    }
    try:
        return command(**values)
    except TypeError as err:  # another version's
        raise ConfigError(f"these are no settings of this version's {command.__name__.lower()}: {err}.") from None


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        if not 1 <= getattr(config, name) <= MAX_COUNT:
            raise ConfigError(f"{name} must be at least 1 (and at most {MAX_COUNT:,}), got {getattr(config, name)}.")


def toml_flags(fpath: Path, command: type, *, lists: tuple[str, ...] = ()) -> list[str]:
    """The fields in a TOML file as command-line flags, to be put before the user's own.

    Args:
        fpath: file whose top level holds fields of `command`, by name.
        command: the dataclass.
        lists: fields that may be lists although their flag takes one value.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds a field that `command` lacks, or a value of another type.
    """
    try:
        table: dict[str, Any] = tomllib.loads(fpath.read_text(encoding="utf-8-sig"))
    except OSError as err:
        raise ConfigError(f"{fpath}: {err.strerror}; --config takes a TOML file.") from err
    except (ValueError, RecursionError) as err:  # TOMLDecodeError and UnicodeDecodeError are the former
        raise ConfigError(f"{fpath} is not TOML: {err}.") from None
    hints = {name: hint for name, hint in get_type_hints(command).items() if name != "config"}
    flags: list[str] = []
    for name, value in table.items():
        if name not in hints:
            raise ConfigError(f"{fpath} sets {name!r}, which {command.__name__.lower()} does not know; {_advice(name, hints)}")
        values = value if name in lists and isinstance(value, list) else [value]
        if not values or not all(_is_a(each, hints[name]) for each in values):
            or_several = ", or a list of them" if name in lists else ""
            raise ConfigError(f"{fpath}: {name} is {value!r}; expected {_expected(hints[name])}{or_several}.")
        flag = name.replace("_", "-")
        match value:
            case bool():
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            case []:
                pass  # as if it were not there
            case list():
                flags += [f"--{flag}", *map(str, value)]
            case _:
                flags.append(f"--{flag}={value}")  # one word: it may begin with a dash
    return flags


def spellings(name: str) -> tuple[str, ...]:
    """The flag of a field, and other names that it has."""
    return (f"--{name.replace('_', '-')}", *ALIASES.get(name, ()))


def refuse_repeated(flags: Sequence[str], command: type, *, lists: tuple[str, ...] = ()) -> None:
    """Refuse a flag of several values that is given twice: the last would win, and the other values be missing.

    Args:
        flags: a user's own.
        command, lists: as for `toml_flags`.

    Raises:
        ConfigError: there is one.
    """
    if {"-h", "--help"} & set(flags):
        return
    said = [word.partition("=")[0].replace("_", "-") for word in flags if word.startswith("--")]
    for name, hint in get_type_hints(command).items():
        if name not in lists and not (get_origin(hint) is tuple and get_args(hint)[-1] is ...):
            continue
        flag, *_ = names = spellings(name)
        if sum(map(said.count, names)) > 1:
            raise ConfigError(f"{flag} is given twice, and only the last would count; write it once: {flag} A B.")


def _advice(name: str, hints: dict[str, Any]) -> str:
    """What a field that is not known should have been. Less alike than a slip of the pen is another command's field."""
    written = name.replace("-", "_")
    positive = written.removeprefix("no_")
    if positive != written and hints.get(positive) in (bool, bool | None):
        return f'write "{positive} = false".'
    near = get_close_matches(written, hints, 1, cutoff=0.85)
    if near:
        return f"did you mean {near[0]!r}?"
    owners = [other.__name__.lower() for other in (Extract, Replay) if written in get_type_hints(other)]
    if owners and written != "config":
        return f"it is one of {' and '.join(owners)}: write --config among the flags of that."
    return f"it knows {', '.join(hints)}."


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value out of a TOML file is what a field takes. One may stand for a list of any length."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list) else [value]
        return (parts[-1] is ... or len(values) == len(parts)) and all(_is_a(each, parts[0]) for each in values)
    if parts:  # one of several, or nothing
        return any(_is_a(value, part) for part in parts)
    if isinstance(value, str) and "\0" in value:  # no path, nor a word of a command line
        return False
    return type(value) in {float: (float, int), Path: (str,)}.get(hint, (hint,))


def _expected(hint: Any) -> str:
    parts = [part for part in get_args(hint) if part is not NoneType]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if get_origin(hint) is tuple:
        return f"a list{'' if parts[-1] is ... else f' of {len(parts)}'}, each {_expected(parts[0])}"
    if parts:
        return " or ".join(map(_expected, parts))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes", Path: "a path in quotes"}[
        hint
    ]
