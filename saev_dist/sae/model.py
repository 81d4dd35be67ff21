"""A sparse autoencoder in memory, and its encoder: activations in, sparse codes out.

The encoder cuts a batch into blocks of rows. On the CPU each block is the work of one thread, from the product to the
codes, so no thread waits for another, and a code does not depend on the number of threads. The blocks' dense codes,
one per thread, are the only dense arrays there are.

Names: `b` tokens of a batch or block, `d` model width, `s` features, `g` groups of features, `n` codes.
"""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from saev_dist.accumulators.base import Codes

Precision = Literal["fp32", "tf32", "bf16"]

CPU_BLOCK_CODES = 2**24  # 67 MB: fewer rows slow the product
CPU_BLOCK_TOKENS = 2048  # with few features: blocks enough for all threads
GROUPS_PER_K = 4
FP32_MAX = float(np.finfo(np.float32).max)
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Relu:
    """`max(h, 0)`."""

    name = "relu"


@dataclass(frozen=True)
class TopK:
    """The k largest values of a token. Of equal values the lower feature wins: the choice does not depend on the device."""

    k: int
    relu: bool = False
    """Drop those of them that are not above zero. Without it negative ones can survive."""

    name = "topk"


@dataclass(frozen=True, eq=False)
class Threshold:
    """`h` where `h > threshold`, else 0: JumpReLU, and BatchTopK at inference. A threshold below 0 counts as 0."""

    threshold: float | Tensor
    """One number, or float32 (s,): one for each feature."""

    name = "threshold"


@dataclass(frozen=True, eq=False)
class Gated:
    """`max(scale * (h - b_enc) + b_mag, 0)` where `h > 0`, else 0: one product for the gate and for the magnitude.

    Source: Rajamanoharan et al., "Improving Dictionary Learning with Gated Sparse Autoencoders" (2024), eqs. 6 and 7.
    """

    scale_s: Tensor
    """float32 (s,), above zero: `exp(r_mag)`."""
    b_mag_s: Tensor
    """float32 (s,)."""

    name = "gated"


@dataclass(frozen=True)
class GroupMax:
    """Of each of `k` consecutive groups of features the largest, where it is above zero; the lower feature of equal ones."""

    k: int
    """Groups; it divides d_sae."""

    name = "groupmax"


Activation = Relu | TopK | Threshold | Gated | GroupMax


@dataclass(frozen=True)
class LayerNorm:
    """`(x - mean) / (std + 1e-5)` of each token, std unbiased; the decoder's output is multiplied by std, mean added.

    Source: SAELens, `sae_lens/saes/sae.py`, `run_time_activation_ln_in` and `_out`.
    """

    name = "layer_norm"

    def apply(self, x_bd: Tensor) -> Tensor:
        """The normalised tokens, float32. Taken in float64, so that it does not depend on how many tokens come at a time."""
        mean_b, std_b = self._moments(x_bd)
        return ((x_bd.double() - mean_b) / (std_b + LAYER_NORM_EPS)).float()

    def undo(self, decoded_bd: Tensor, x_bd: Tensor) -> Tensor:
        """The decoder's output in the units of `x_bd`, float32."""
        mean_b, std_b = self._moments(x_bd)
        return (decoded_bd * std_b + mean_b).float()

    @staticmethod
    def _moments(x_bd: Tensor) -> tuple[Tensor, Tensor]:
        x_bd = x_bd.double()
        return x_bd.mean(dim=1, keepdim=True), x_bd.std(dim=1, keepdim=True)


@dataclass(frozen=True)
class ConstantNorm:
    """`x * sqrt(d) / |x|` of each token, 0 for a zero token; the decoder's output is divided by the same factor.

    Source: SAELens, `sae_lens/saes/sae.py`, "constant_norm_rescale" (NaN there for a zero token).
    """

    name = "constant_norm_rescale"

    def apply(self, x_bd: Tensor) -> Tensor:
        """The rescaled tokens, float32. Taken in float64, as LayerNorm is."""
        return (x_bd.double() / self._size(x_bd).clamp_min(torch.finfo(torch.float64).tiny)).float()

    def undo(self, decoded_bd: Tensor, x_bd: Tensor) -> Tensor:
        """The decoder's output in the units of `x_bd`, float32."""
        return (decoded_bd * self._size(x_bd)).float()

    @staticmethod
    def _size(x_bd: Tensor) -> Tensor:
        size_b: Tensor = torch.linalg.vector_norm(x_bd, dim=1, keepdim=True, dtype=torch.float64)
        return size_b / math.sqrt(x_bd.shape[1])


@dataclass(frozen=True, eq=False)
class Given:
    """`(x - mean) * scale` with the training data's mean and scale; both are folded into the weights, so they cost nothing."""

    mean_d: Tensor
    """float32 (d,)."""
    scale: float

    name = "given"


InputNorm = LayerNorm | ConstantNorm | Given
TOKEN_NORMS: dict[str, InputNorm | None] = {"none": None, LayerNorm.name: LayerNorm(), ConstantNorm.name: ConstantNorm()}
"""Those that a name says all about."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sae:
    """Weights (float32, CPU) and the rules to read them under.

    Encode: `h = x @ W_enc + b_enc`, where `x` is first normalised by `input_norm`, and then has `b_dec` subtracted where
    `pre_bias`; then the activation. Decode: `f @ W_dec + b_dec`, and back by `input_norm`.
    """

    w_enc_ds: Tensor
    b_enc_s: Tensor
    w_dec_sd: Tensor
    b_dec_d: Tensor
    activation: Activation
    pre_bias: bool
    input_norm: InputNorm | None = None
    reconstructs: bool = True
    """False for a transcoder, and for one with a skip connection: its decoder alone does not give the activations back."""
    missing: str = ""
    """Flag that must say what the file leaves out, before anything is encoded."""
    source: str
    """The file's format, in words."""

    @property
    def d_model(self) -> int:
        return self.w_enc_ds.shape[0]

    @property
    def d_sae(self) -> int:
        return self.w_enc_ds.shape[1]

    def rules(self) -> dict[str, Any]:
        """How the weights are read, as JSON; with the weights it determines every code."""
        rules: dict[str, Any] = {"activation": self.activation.name}
        match self.activation:
            case TopK(k, relu):
                rules |= {"k": k, "relu": relu}
            case GroupMax(k):
                rules |= {"k": k}
            case Threshold(float() as threshold):
                rules |= {"threshold": threshold}
        rules |= {"pre_bias": self.pre_bias, "input_norm": self.input_norm.name if self.input_norm else "none"}
        if isinstance(self.input_norm, Given):
            rules |= {"input_scale": self.input_norm.scale}
        return rules | {"reconstructs": self.reconstructs}

    def decoder(self) -> tuple[Tensor, Tensor]:
        """`W_dec` (s, d) and `b_dec` (d,) with a given mean and scale folded in."""
        if not isinstance(self.input_norm, Given):
            return self.w_dec_sd, self.b_dec_d
        return self.w_dec_sd / self.input_norm.scale, self.b_dec_d / self.input_norm.scale + self.input_norm.mean_d

    def undo_norm(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What takes the output of `decoder()` for tokens, and the tokens, to their units; None: nothing to do."""
        return self.input_norm.undo if isinstance(self.input_norm, LayerNorm | ConstantNorm) else None


class ActivationOverflow(Exception):
    """A batch is not finite, or so large that its product would not be: the caller knows its place.

    Args:
        limit: magnitude that no activation may reach.
    """

    def __init__(self, limit: float) -> None:
        super().__init__(limit)
        self.limit = limit


class Encoder:
    """An SAE's encoder on one device. A context manager: its threads end with it.

    Inside, torch uses one thread for each operation of this process: the threads work on blocks side by side.

    Args:
        sae: weights and rules.
        device: where the product runs.
        precision: fp32; tf32 (CUDA only); bf16, whose product is rounded to 8 bits and so has many ties.
        n_threads: blocks that are encoded at a time.

    Device memory: the weights, and for each thread a block of (block_tokens, d_sae) floats with its mask.
    """

    def __init__(self, sae: Sae, device: torch.device, precision: Precision, n_threads: int) -> None:
        # Process-wide switches of torch: TF32 only where asked for.
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        self.sae, self.device = sae, device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.n_threads = n_threads
        bias_s, shift_d, self._scale = sae.b_enc_s.double(), sae.b_dec_d.double() * sae.pre_bias, 1.0
        if isinstance(sae.input_norm, Given):
            self._scale = sae.input_norm.scale
            shift_d = shift_d + sae.input_norm.mean_d.double() * self._scale
        self._shift_d = shift_d
        if shift_d.any():  # (scale x - shift) @ W + b = x @ (scale W) + (b - shift @ W), folded once in float64
            with _one_thread():
                bias_s = bias_s - shift_d @ sae.w_enc_ds.double()
        w_ds = sae.w_enc_ds if self._scale == 1 else sae.w_enc_ds * self._scale
        # |h| <= max|x| * gain + max|bias|, so one look at x rules out overflow in the whole product.
        gain_s, offset_s = w_ds.abs().sum(dim=0, dtype=torch.float64), bias_s.abs()
        if isinstance(sae.activation, Gated):
            scale_s = sae.activation.scale_s.double()
            shift_s = sae.activation.b_mag_s.double() - scale_s * sae.b_enc_s.double()
            gain_s, offset_s = gain_s * scale_s.clamp(min=1), offset_s * scale_s.clamp(min=1) + shift_s.abs()
            self._mag_scale_s, self._mag_shift_s = scale_s.float().to(device), shift_s.float().to(device)
        limit = (FP32_MAX - float(offset_s.max())) / max(float(gain_s.max()), 1e-300)
        if isinstance(sae.input_norm, LayerNorm | ConstantNorm):  # whose tokens have a norm of at most sqrt(d)
            limit = FP32_MAX if limit > math.sqrt(sae.d_model) else 0.0
        self._limit = min(FP32_MAX, limit)
        self._w_ds = w_ds.to(device, self.dtype)
        self._b_s = bias_s.to(device, self.dtype)
        self._threshold: float | Tensor = 0.0
        if isinstance(sae.activation, Threshold):
            threshold = sae.activation.threshold
            if isinstance(threshold, Tensor):
                self._threshold = threshold.clamp(min=0).to(device, self.dtype)
            else:
                self._threshold = max(threshold, 0.0)
        self._local = threading.local()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._stack.enter_context(_one_thread())
        # torch's setting is each thread's own for MKL, hence the initializer
        self._pool = ThreadPoolExecutor(
            self.n_threads, thread_name_prefix="encoder", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._stack.callback(self._pool.shutdown, wait=True, cancel_futures=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def encode(self, acts_bd: Tensor, *, img_i: int, n_patches: int, lift_s: Tensor | None = None) -> Codes:
        """The nonzero codes of whole examples: `submit` and wait."""
        return self.submit(acts_bd, img_i=img_i, n_patches=n_patches, lift_s=lift_s)()

    def submit(
        self, acts_bd: Tensor, *, img_i: int, n_patches: int, only: Tensor | None = None, lift_s: Tensor | None = None
    ) -> Callable[[], Codes]:
        """Begin to encode whole examples.

        Args:
            acts_bd: float32 (tokens, d_model) on the CPU; the content tokens of consecutive examples. It must not
                change before the codes are used.
            img_i: global index of the first example.
            n_patches: tokens per example.
            only: features whose codes are wanted, int64, on the encoder's device; None: all. The others do not leave
                the device.
            lift_s: float32 (s,), added to the scores before the activation decides which to keep; None: nothing.

        Returns:
            A function that waits for the codes; they are on the CPU, ordered by token. It raises ActivationOverflow
            where a value is NaN, infinite, or too large for a float32 product.
        """
        n_tokens = len(acts_bd)
        block = block_tokens(n_tokens, self.sae.d_sae, self.device)
        starts = range(0, n_tokens, block)
        bias_s = self._b_s
        if lift_s is not None:
            if isinstance(self.sae.activation, Gated):  # the gate decides, and its h becomes a score by this factor
                lift_s = lift_s / self.sae.activation.scale_s
            bias_s = bias_s + lift_s.to(self.device, self.dtype)
        blocks = [self._pool.submit(self._encode_block, acts_bd[first : first + block], bias_s, only) for first in starts]

        def codes() -> Codes:
            parts = []
            for first, done in zip(starts, blocks, strict=True):
                token_n, feature_n, value_n = done.result()
                parts.append((token_n + first, feature_n, value_n))
            token_n, feature_n, value_n = (torch.cat(part) for part in zip(*parts, strict=True))
            return Codes(
                token_n=token_n,
                feature_n=feature_n,
                value_n=value_n,
                img_i=img_i,
                n_imgs=n_tokens // n_patches,
                n_patches=n_patches,
                acts_bd=acts_bd,
            )

        return codes

    def magnitude(self, acts_nd: Tensor, feature_n: Tensor) -> Tensor:
        """What the rounding error of a score is relative to: the sum of the magnitudes of its terms.

        Args:
            acts_nd: float32 (n, d_model), on the CPU.
            feature_n: int64 (n,).

        Returns:
            float32 (n,), on the CPU.
        """
        norm, activation = self.sae.input_norm, self.sae.activation
        if isinstance(norm, LayerNorm | ConstantNorm):
            acts_nd = norm.apply(acts_nd)
        x_nd = acts_nd.abs() * abs(self._scale) + self._shift_d.abs().float()
        terms_n = (x_nd * self.sae.w_enc_ds[:, feature_n].T.abs()).sum(dim=1) + self.sae.b_enc_s[feature_n].abs()
        if isinstance(activation, Gated):
            terms_n = terms_n * activation.scale_s[feature_n] + activation.b_mag_s[feature_n].abs()
        return terms_n

    def _encode_block(self, acts_bd: Tensor, bias_s: Tensor, only: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Token (int64, within the block), feature (int64) and value (float32) of each nonzero code, on the CPU."""
        low, high = torch.aminmax(acts_bd)
        if not max(-float(low), float(high)) < self._limit:  # NaN and infinity travel through aminmax
            raise ActivationOverflow(self._limit)
        n_tokens, d_sae = len(acts_bd), self.sae.d_sae
        h_bs, mask_bs = self._dense(n_tokens)
        if isinstance(self.sae.input_norm, LayerNorm | ConstantNorm):
            acts_bd = self.sae.input_norm.apply(acts_bd.to(self.device, non_blocking=True))
        torch.addmm(bias_s, acts_bd.to(self.device, self.dtype, non_blocking=True), self._w_ds, out=h_bs)
        match self.sae.activation:
            case TopK(k):
                torch.ge(h_bs, _kth_bound(h_bs, min(k, d_sae)), out=mask_bs)
            case GroupMax(k):
                h_bkg, mask_bkg = h_bs.unflatten(1, (k, -1)), mask_bs.unflatten(1, (k, -1))
                torch.eq(h_bkg, h_bkg.amax(dim=2, keepdim=True), out=mask_bkg)
            case _:
                torch.gt(h_bs, self._threshold, out=mask_bs)
        flat_n = _flat_nonzero(mask_bs)
        value_n = h_bs.view(-1)[flat_n].float()
        token_n = flat_n // d_sae
        feature_n = flat_n - token_n * d_sae
        codes = token_n, feature_n, value_n
        match self.sae.activation:
            case TopK(k, relu):
                codes = _keep_k(*codes, n_tokens, min(k, d_sae))
                if relu:
                    codes = _where(codes[2] > 0, codes)
            case GroupMax(k):  # of equal values the first: they lie side by side
                group_n = flat_n // (d_sae // k)
                keep_n = value_n > 0
                keep_n[1:] &= group_n[1:] != group_n[:-1]
                codes = _where(keep_n, codes)
            case Gated():
                value_n = value_n * self._mag_scale_s[feature_n] + self._mag_shift_s[feature_n]
                codes = _where(value_n > 0, (token_n, feature_n, value_n))
        if only is not None:
            codes = _where(torch.isin(codes[1], only), codes)
        token_n, feature_n, value_n = codes
        return token_n.cpu(), feature_n.cpu(), value_n.cpu()

    def _dense(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """This thread's block and mask, kept for the whole run: a fresh array is paged in anew for each block."""
        kept = getattr(self._local, "dense", None)
        if kept is None or len(kept[0]) < n_tokens:
            shape = (n_tokens, self.sae.d_sae)
            kept = self._local.dense = (
                torch.empty(shape, device=self.device, dtype=self.dtype),
                torch.empty(shape, device=self.device, dtype=torch.bool),
            )
        return kept[0][:n_tokens], kept[1][:n_tokens]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for each operation of torch: results do not depend on the machine, and our threads have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def block_tokens(n_tokens: int, d_sae: int, device: torch.device) -> int:
    """Rows of a batch encoded at a time: a function of the shapes and the kind of device, never of rank or threads."""
    if device.type != "cpu":
        return n_tokens
    n_blocks = max(-(-n_tokens * d_sae // CPU_BLOCK_CODES), -(-n_tokens // CPU_BLOCK_TOKENS))
    return -(-n_tokens // n_blocks)


def usable_precision(wanted: Precision, device: torch.device) -> Precision:
    """The precision that a run had, or fp32 where this device lacks it."""
    return "fp32" if wanted == "tf32" and device.type != "cuda" else wanted


def batch_threads(batch_tokens: int, d_sae: int, device: torch.device) -> int:
    """Threads that encode batches: torch's own number on the CPU, but no more than a batch has blocks; 1 elsewhere.

    So the blocks together are never larger than one dense array of a batch.
    """
    if device.type != "cpu":
        return 1
    return min(torch.get_num_threads(), -(-batch_tokens // block_tokens(batch_tokens, d_sae, device)))


def _kth_bound(h_bs: Tensor, k: int) -> Tensor:
    """A value per row, (b, 1), that at least `k` entries of the row reach and few others do.

    The k-th largest of the maxima of disjoint groups: each of those maxima is an entry of the row. Finding it
    reads the block once and selects among a few hundred numbers instead of all features.
    """
    _n_tokens, d_sae = h_bs.shape
    group = max(1, d_sae // (GROUPS_PER_K * k))
    n_groups = d_sae // group
    maxima_bg = h_bs[:, : group * n_groups].unflatten(1, (group, n_groups)).amax(dim=1) if group > 1 else h_bs
    return maxima_bg.topk(k, dim=1, sorted=True).values[:, -1:]


def _where(keep_n: Tensor, codes: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Some of the codes."""
    token_n, feature_n, value_n = codes
    return token_n[keep_n], feature_n[keep_n], value_n[keep_n]


def _flat_nonzero(mask: Tensor) -> Tensor:
    """Flat positions of the true entries, int64, ascending."""
    if mask.device.type == "cpu":  # NumPy skips eight zeros at a time; torch.nonzero took 4 times as long
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def _keep_k(token_n: Tensor, feature_n: Tensor, value_n: Tensor, n_tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates ordered by token then feature keep each token's k largest, the lower feature first among equals."""
    count_b = torch.bincount(token_n, minlength=n_tokens)
    start_b = count_b.cumsum(0) - count_b
    over_b = count_b > k
    keep_n = torch.ones_like(token_n, dtype=torch.bool)
    crowded_n = over_b[token_n].nonzero().squeeze(1)  # only rows with too many candidates need a choice
    if len(crowded_n):
        row_c = (over_b.cumsum(0) - 1)[token_n[crowded_n]]
        place_c = crowded_n - start_b[token_n[crowded_n]]
        width = int(count_b.max())
        padded_bk = torch.full((int(over_b.sum()), width), -torch.inf, device=value_n.device)
        # -0.0 and 0.0 are one value; adding 0.0 turns the former into the latter
        padded_bk[row_c, place_c] = value_n[crowded_n] + 0.0
        order_bk = padded_bk.argsort(dim=1, descending=True, stable=True)
        rank_bk = torch.empty_like(order_bk).scatter_(
            1, order_bk, torch.arange(width, device=value_n.device).expand_as(order_bk)
        )
        keep_n[crowded_n] = rank_bk[row_c, place_c] < k
    keep_n &= value_n != 0
    return token_n[keep_n], feature_n[keep_n], value_n[keep_n]
