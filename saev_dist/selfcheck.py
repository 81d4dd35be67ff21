"""Is the SAE read under the right rules? Tokens of the shards are encoded and decoded, also under other readings.

A checkpoint read wrongly runs as well as one read rightly, and every number is wrong. What gives it away is that its
decoder no longer gives the activations back. So some tokens, spread over all shards, go through the SAE as the run will
read it and as each of a few common mistakes would have it; where one of those reconstructs clearly better, or nothing
reconstructs at all, there is a finding.

Cost: for each reading the encoder's and the decoder's work on `n_tokens` tokens. The ReLU reading of a top-k SAE, which
fires half of all features, takes half of it: at d_model 1,024 and d_sae 16,384 2.6 of the 5.5 s of two cores (Zen 5).

Names: `b` tokens, `d` model width, `s` features.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from saev_dist.accumulators.base import Codes, DeviceCodes
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.config import from_json
from saev_dist.data.reader import sample_images
from saev_dist.data.shards import Shards
from saev_dist.errors import CheckpointError, ConfigError, MergeError, RunError, warn
from saev_dist.fields import Fields
from saev_dist.machine import memory_wanted
from saev_dist.output import table
from saev_dist.sae.encoder import ActivationOverflow, Encoder, batch_threads
from saev_dist.sae.model import ConstantNorm, Given, LayerNorm, Relu, Sae, Threshold, TopK

N_TOKENS, FEW_TOKENS, N_IMAGES = 4096, 512, 64
MAX_PRODUCTS, MAX_CODES = 2**36, 2**28  # tokens times weights of the encoder, and times features
CHUNK_CODES, LEAST_TOKENS = 2**20, 8  # codes of the tokens that are encoded at a time, but some tokens at least
GROWTH = 8  # times as many tokens at a time, when some turn out to have few codes
TOP_KS = (4, 8, 16, 32, 64, 128, 256)
LONG = 2**25  # tokens times features that take CPUs many seconds
CLEARLY, AT_LEAST = 0.8, 0.05
"""Another reading is clearly better with an error below this share of the run's own, and lower by this much."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a reading gave."""

    reading: str
    flags: str
    """What makes `extract` read it so."""
    normalized_mse: float | None
    """None where it cannot be computed: activations that are all equal, numbers out of range."""
    l0: float
    """Features above zero, per token."""
    dead_share: float
    """Features that fired on none of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The readings, the one that the run uses first, and what is wrong with it, if anything."""

    n_tokens: int
    figures: list[Figures]
    finding: str | None

    def to_json(self) -> dict[str, Any]:
        """For run.json and the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: Any) -> "Report | None":
        """The report in a run.json; None: it has none, or one that this version would not write."""
        try:
            report = Fields(obj, "", RunError)
            figures = [from_json(Figures, Fields(each, "", RunError).obj) for each in report.get("figures", list)]
            if not all(math.isfinite(x) for part in figures for x in (part.normalized_mse or 0.0, part.l0, part.dead_share)):
                return None
            finding = None if report.obj.get("finding") is None else report.get("finding", str)
            return cls(n_tokens=report.get("n_tokens", int), figures=figures, finding=finding)
        except (ConfigError, RunError, OverflowError):  # the last of an integer that no float is as large as
            return None

    def __str__(self) -> str:
        lines = {"self-check": f"{self.n_tokens:,} tokens"}
        lines |= {f"  {figures.reading}": _words(figures) for figures in self.figures}
        none = "none: the SAE gives the activations back best as it is read"
        if not self.figures or self.figures[0].normalized_mse is None:
            none = "none: nothing can be told from activations that are all equal, or beyond what the SAE can be given"
        return table(lines | {"finding": self.finding or none})


def check(
    sae: Sae,
    shards: Shards,
    device: torch.device,
    mode: Literal["off", "warn", "strict"],
    *,
    known: Report | None = None,
    skip_bad: bool = False,
    look: Callable[[], None] = lambda: None,
) -> Report | None:
    """Look at some tokens, and warn or stop where they say that the SAE is misread. None: it did not look.

    It prints a line where that will take a while.

    Args:
        known: what an earlier attempt at the run found; it does not look again.
        skip_bad: leave out images that cannot be read, or are not finite.
        look: called now and then; what it raises ends the check.

    Raises:
        CheckpointError: there is a finding, and `mode` is strict.
        ConfigError: there is not enough memory for a look, and `mode` is strict.
        DataError: a token is not finite.
    """
    if mode == "off" or not sae.reconstructs:
        return None
    if known is None and device.type == "cpu" and n_tokens(sae) * sae.d_sae >= LONG:
        print(
            f"self-check: about {n_tokens(sae):,} tokens under each reading of the SAE (--self-check off leaves it out)",
            flush=True,
        )
    report, where = known, ""
    try:
        report = known or examine(sae, shards, device, skip_bad=skip_bad, look=look)
    except (MemoryError, RuntimeError) as err:
        if not (where := memory_wanted(err, device)):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what each reading's streams kept
    if report is None:
        missed = f"the self-check needs more memory than {where} has: the SAE was not tried under other readings."
        if mode == "strict":
            raise ConfigError(f"{missed} (--self-check warn goes on.)")
        warn(missed)
        return None
    if report.finding is not None:
        if mode == "strict":
            raise CheckpointError(f"{report.finding} (--self-check warn goes on.)")
        warn(report.finding)
    return report


def examine(
    sae: Sae, shards: Shards, device: torch.device, *, skip_bad: bool = False, look: Callable[[], None] = lambda: None
) -> Report:
    """Measure all readings. `look` is called now and then; what it raises ends it.

    Raises:
        DataError: a token is not finite.
    """
    x_bd = _sample(shards, n_tokens(sae), skip_bad=skip_bad)
    if not len(x_bd):
        return Report(n_tokens=0, figures=[], finding=None)
    own = _measure(sae, x_bd, device, "as it is read", "", look)
    others = [_measure(other, x_bd, device, name, flags, look) for name, flags, other in _other_readings(sae, x_bd, own.l0)]
    return Report(n_tokens=len(x_bd), figures=[own, *others], finding=_finding(own, others, len(x_bd)))


def n_tokens(sae: Sae) -> int:
    """About how many tokens to look at: fewer for a large SAE, which would take hours."""
    return min(N_TOKENS, max(FEW_TOKENS, min(MAX_PRODUCTS // sae.w_enc_ds.numel(), MAX_CODES // sae.d_sae)))


def _sample(shards: Shards, n_tokens: int, *, skip_bad: bool) -> Tensor:
    """About `n_tokens` tokens of images spread over all shards, in random order, float32 (b, d)."""
    step = max(1, min(N_IMAGES, shards.n_examples) * shards.n_patches // n_tokens)
    images = sample_images(shards, N_IMAGES, skip_bad=skip_bad)
    x_bd = torch.cat([torch.empty(0, shards.d_model), *(acts_pd[::step] for acts_pd in images)])
    return x_bd[torch.randperm(len(x_bd), generator=torch.Generator().manual_seed(0))]


def _other_readings(sae: Sae, x_bd: Tensor, l0: float) -> list[tuple[str, str, Sae]]:
    """What else the weights could mean: words, flags, and the SAE. `l0`: features per token as it is read."""
    readings: list[tuple[str, str, Sae]] = []

    def add(name: str, flags: str, **rules: Any) -> None:
        readings.append((name, flags, replace(sae, **rules)))

    if sae.b_dec_d.any():
        name, flag = ("b_dec not subtracted", "--no-pre-bias") if sae.pre_bias else ("b_dec subtracted", "--pre-bias")
        add(name, flag, pre_bias=not sae.pre_bias)

    match sae.activation:
        case TopK():
            add("ReLU, not top-k", "--activation relu", activation=Relu())
        case Relu() | Threshold():
            is_threshold = isinstance(sae.activation, Threshold)
            if is_threshold:
                add("ReLU, no threshold", "--activation relu", activation=Relu())
            instead = "the --threshold of training, or " if is_threshold else ""
            for k in TOP_KS:
                if k < l0:  # a top-k SAE without its top-k fires too much
                    add(
                        f"top {k}",
                        f"{instead}--activation topk:K with the K of training, about {k}",
                        activation=TopK(k, relu=sae.relu_of_top_k),
                    )

    match sae.input_norm:
        case None:
            if sae.d_model > 1:  # one number has no deviation
                add("layer norm", "--input-norm layer_norm", input_norm=LayerNorm())
            add("constant norm", "--input-norm constant_norm_rescale", input_norm=ConstantNorm())
            zero_d, mean_d = torch.zeros(sae.d_model), x_bd.mean(dim=0, dtype=torch.float64).float()
            for name, mean, flags in (("scaled", zero_d, ""), ("mean subtracted, scaled", mean_d, "--input-mean FILE ")):
                size = float((x_bd - mean).norm(dim=1).double().mean())
                if size > 0:  # training usually brought the mean norm to sqrt(d)
                    scale = math.sqrt(sae.d_model) / size
                    add(f"{name} by {scale:.4g}", f"{flags}--input-scale {scale:.4g}", input_norm=Given(mean, scale))
        case Given():
            add("not scaled", "--input-norm none, and neither --input-mean nor --input-scale", input_norm=None)
        case _:
            add("not normalised", "--input-norm none", input_norm=None)
    return readings


def _measure(sae: Sae, x_bd: Tensor, device: torch.device, name: str, flags: str, look: Callable[[], None]) -> Figures:
    """Encode and decode the tokens under one reading."""
    reconstruction = Reconstruction(*sae.decoder(), sae.undo_norm())
    n_fired, fired_s = 0, torch.zeros(sae.d_sae, dtype=torch.bool, device=device)
    try:
        with Encoder(sae, device, "fp32", batch_threads(device)) as encoder, encoder.beside():
            for codes in _encoded(encoder, x_bd):
                look()
                reconstruction.add(codes)
                fired_n = codes.feature_n[codes.value_n > 0]  # a TopK without ReLU has codes below zero
                n_fired += len(fired_n)
                fired_s[fired_n] = True
                encoder.wait()
    except (ActivationOverflow, CheckpointError, MergeError):  # the stream tells, if it is the run's own reading
        return Figures(reading=name, flags=flags, normalized_mse=None, l0=0.0, dead_share=1.0)
    return Figures(
        reading=name,
        flags=flags,
        normalized_mse=reconstruction.finalize(len(x_bd))["metrics"]["normalized_mse"],
        l0=n_fired / len(x_bd),
        dead_share=1 - float(fired_s.sum()) / sae.d_sae,
    )


def _encoded(encoder: Encoder, x_bd: Tensor) -> Iterator[Codes | DeviceCodes]:
    """The codes of the tokens, in chunks: first a small one, for all features may fire; then as large as if the tokens to
    come had twice as many codes each as those of the densest chunk so far, but at most a thread's share of what is left."""
    under_way: deque[Future[Codes] | Future[DeviceCodes]] = deque()
    first, step, densest = 0, max(LEAST_TOKENS, CHUNK_CODES // encoder.sae.d_sae), 0.0
    while first < len(x_bd) or under_way:
        most_under_way = encoder.n_threads if densest else 0  # the first one alone: it tells how dense they are
        if first < len(x_bd) and len(under_way) <= most_under_way:
            under_way.extend(encoder.submit_batch(x_bd[first : first + step], img_i=0, n_patches=1))
            first += step
            continue
        codes = under_way.popleft().result()
        densest = max(densest, len(codes.value_n) / codes.n_imgs, 0.5)  # more than 0, be they all silent
        share = -(-(len(x_bd) - first) // encoder.n_threads)
        step = max(LEAST_TOKENS, min(GROWTH * step, int(CHUNK_CODES / (2 * densest)), share))
        yield codes


def _finding(own: Figures, others: list[Figures], n_tokens: int) -> str | None:
    """What to tell the user, or None."""
    own_error = math.inf if own.normalized_mse is None else own.normalized_mse
    measured = [(figures.normalized_mse, figures) for figures in others if figures.normalized_mse is not None]
    lowest = min((error for error, _ in measured), default=math.inf)
    # Of those that reconstruct about equally well the sparsest: more features always can.
    good = [pair for pair in measured if pair[0] <= lowest + AT_LEAST]
    error, best = min(good, key=lambda pair: (pair[1].l0, pair[0]), default=(math.inf, own))
    start = f"on {n_tokens:,} tokens the SAE as it is read gives {_words(own)}"
    if error < min(CLEARLY * own_error, own_error - AT_LEAST, 1):
        return f"{start}; {best.reading}: {_words(best)}. If it was trained so, use {best.flags}."
    if own_error > 1 and (measured or own.normalized_mse is not None):
        than = f" (the best, {best.reading}: {error:.4f})" if measured else ""
        return (
            f"{start}, and none of the readings that were tried does clearly better than the mean activation would{than}. "
            "Is it the SAE of this model and layer, and were the activations normalised?"
        )
    return None


def _words(figures: Figures) -> str:
    if figures.normalized_mse is None:
        return "normalized MSE not computable"
    return f"normalized MSE {figures.normalized_mse:.4f}, L0 {figures.l0:.1f}, {figures.dead_share:.1%} of features silent"
