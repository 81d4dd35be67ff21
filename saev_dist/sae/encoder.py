"""Activations in, sparse codes out: an SAE's rules applied on one device.

On the CPU a batch is encoded in pieces of whole images, each the work of one thread, from the product to the ordered
codes: no thread waits for another, and a code does not depend on the number of threads. The product is made for some
features of a piece at a time, in a block that stays in the cache: it is written, looked at once and overwritten, which
is faster than one product whose result goes to memory.

On a GPU a batch is one piece. Two are under way, each in a *lane*, a thread with a stream of its own: while one is
copied there, or waits to learn how many codes it has, the other's product keeps the GPU busy. The codes stay there.

The blocks, one per thread, are the only dense arrays there are.

Names: `b` tokens of a piece or block, `c` columns of a block, `d` model width, `s` features, `n` codes.
"""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import count
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from saev_dist.accumulators.base import Codes, DeviceCodes, stable_order
from saev_dist.errors import CheckpointError
from saev_dist.fused import kernels_on
from saev_dist.machine import cpu_threads, one_thread
from saev_dist.sae.model import ConstantNorm, Gated, Given, GroupMax, LayerNorm, Precision, Sae, Threshold, TopK
from saev_dist.sae.pieces import LANES, block_shape, encodes_at_once, feature_blocks, piece_images
from saev_dist.sae.product import NumpyProduct, Product, TorchProduct, uses_numpy
from saev_dist.sae.screen import Screen
from saev_dist.sae.select import select_at_once
from saev_dist.sae.sieve import Bound, Sieve, keep

FP32_MAX = float(np.finfo(np.float32).max)
FOLD_FEATURES = 4096  # whose weights are copied at a time, in float64


class ActivationOverflow(Exception):
    """A batch is not finite, or so large that its product would not be: the caller knows its place.

    Args:
        limit: magnitude that no activation may reach.
    """

    def __init__(self, limit: float) -> None:
        super().__init__(limit)
        self.limit = limit


class Encoder:
    """An SAE's encoder on one device. A context manager: its threads end with it, at once.

    Inside, torch and NumPy use one thread for each operation of this process: the threads work on pieces side by side.

    Args:
        sae: weights and rules.
        device: where the product runs.
        precision: fp32; tf32 (CUDA only); bf16, whose product is rounded to 8 bits and so has many ties.
        n_threads: pieces that are encoded at a time.
        screen: on the CPU, in fp32: make the product in bfloat16 first, and in fp32 only where a code may be.

    Raises:
        CheckpointError: the weights or biases are so large that no product with them is sure to be finite.
        ConfigError: the weights cannot be screened.

    Device memory: the weights, once more where NumPy multiplies, and for each thread a block of `block_shape`.
    """

    def __init__(self, sae: Sae, device: torch.device, precision: Precision, n_threads: int, *, screen: bool = False) -> None:
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
        w_ds = sae.w_enc_ds if self._scale == 1 else sae.w_enc_ds * self._scale
        gain_s = torch.empty(sae.d_sae, dtype=torch.float64)
        with one_thread():
            for first in range(0, sae.d_sae, FOLD_FEATURES):
                part = slice(first, first + FOLD_FEATURES)
                if shift_d.any():  # (scale x - shift) @ W + b = x @ (scale W) + (b - shift @ W), folded once in float64
                    bias_s[part] -= shift_d @ sae.w_enc_ds[:, part].double()
                gain_s[part] = w_ds[:, part].abs().sum(dim=0, dtype=torch.float64)
        # |h| <= max|x| * gain + max|bias|, so one look at x rules out overflow in the whole product.
        offset_s = bias_s.abs()
        if isinstance(sae.activation, Gated):
            scale_s = sae.activation.scale_s.double()
            shift_s = sae.activation.b_mag_s.double() - scale_s * sae.b_enc_s.double()
            gain_s, offset_s = gain_s * scale_s.clamp(min=1), offset_s * scale_s.clamp(min=1) + shift_s.abs()
            self._mag_scale_s, self._mag_shift_s = scale_s.float().to(device), shift_s.float().to(device)
        most = FP32_MAX / 4  # room for margins, partial sums and rounding
        limit = (most - float(offset_s.max())) / max(float(gain_s.max()), 1e-300)
        if isinstance(sae.input_norm, LayerNorm | ConstantNorm):  # whose tokens have a norm of at most sqrt(d)
            limit = most if limit > math.sqrt(sae.d_model) else 0.0
        if limit <= 0:
            raise CheckpointError(
                f"the SAE ({sae.source}) has biases up to {float(offset_s.max()):.2g} and a feature whose weights add up to "
                f"{float(gain_s.max()):.2g}, with which a product leaves the range of float32. A bias that silences a feature "
                "can be as small as -1e30."
            )
        self._limit = min(most, limit)
        weights_ds, self._b_s = w_ds.to(device, self.dtype), bias_s.to(device, self.dtype)
        self._w_ds: Tensor | None = weights_ds
        """None where a product has them."""
        self._threshold: float | Tensor = 0.0
        if isinstance(sae.activation, Threshold):
            threshold = _not_above(torch.as_tensor(sae.activation.threshold).clamp(min=0), self.dtype)
            self._threshold = threshold.to(device) if threshold.dim() else float(threshold)
        self._product: Product | None = None
        if screen:
            assert device.type == "cpu" and precision == "fp32"
            with one_thread():
                self._product, self._w_ds = Screen(weights_ds, self._b_s, self._threshold), None
        self._by_numpy = uses_numpy(device, precision, screen=screen)
        self._making = threading.Lock()
        self._own, self._lanes = _Own(), count()
        self._is_closing = False

    def __enter__(self) -> Self:
        index = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the weights are there, for all streams
            index = self.device.index if self.device.index is not None else torch.cuda.current_device()
            kernels_on(torch.device("cuda", index))  # tried once, before there are threads
        self._stack = ExitStack()
        self._stack.enter_context(one_thread())
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="encoder", initializer=_begin, initargs=(index,))
        self._stack.callback(self._pool.shutdown, wait=True, cancel_futures=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closing = True
        self._stack.close()

    def encode(self, acts_bd: Tensor, *, img_i: int, n_patches: int) -> Codes:
        """The nonzero codes of whole examples: `submit` and wait."""
        return self.submit(acts_bd, img_i=img_i, n_patches=n_patches).result()

    def encode_lifted(self, acts_1d: Tensor, feature: int, lift: float) -> float | None:
        """A feature's score in the code of a token, were it larger by `lift`; None: the code leaves it out nevertheless.

        It looks at all features together, in the caller's thread. Not with `screen`.

        Args:
            acts_1d: float32 (1, d_model), on the CPU, finite.
        """
        activation, x_1d = self.sae.activation, self._normalised(acts_1d.to(self.device))
        if encodes_at_once(self.device):
            assert self._w_ds is not None
            h_1s = torch.addmm(self._b_s, x_1d, self._w_ds)
        else:
            product = self._made_product()
            h_s1 = torch.empty(self.sae.d_sae, 1, dtype=product.dtype)
            product.into(h_s1, slice(0, self.sae.d_sae), product.prepare(x_1d))
            h_1s = h_s1.view(1, -1)
        # With Gated the gate decides, and its h becomes a score by this factor.
        h_1s[0, feature] += lift / float(activation.scale_s[feature]) if isinstance(activation, Gated) else lift
        _, feature_n, value_n = self._finish(*select_at_once(h_1s, activation, self._threshold), None)
        found = value_n[feature_n == feature].tolist()
        return found[0] if found else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, the caller's own work on the device goes before the products that wait there."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self.device, priority=-1)):
            yield

    def wait(self) -> None:
        """Wait until what the caller had done on the device is done: codes that are let go may be overwritten."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def submit_batch(self, acts_bd: Tensor, *, img_i: int, n_patches: int) -> list[Future[Codes]] | list[Future[DeviceCodes]]:
        """Begin to encode a batch, in pieces, and leave the codes where they are made; see `submit`."""
        if encodes_at_once(self.device):
            return [self._pool.submit(self._encode_at_once, acts_bd, img_i, n_patches, None)]
        n_imgs = len(acts_bd) // n_patches
        step = piece_images(n_imgs, n_patches, self.sae.activation, self.sae.d_sae, self.device)
        return [
            self.submit(acts_bd[first * n_patches : (first + step) * n_patches], img_i=img_i + first, n_patches=n_patches)
            for first in range(0, n_imgs, step)
        ]

    def submit(self, acts_bd: Tensor, *, img_i: int, n_patches: int, only: Tensor | None = None) -> Future[Codes]:
        """Begin to encode whole examples, as one piece, and bring the codes to the CPU.

        Args:
            acts_bd: float32 (tokens, d_model) on the CPU; the content tokens of consecutive examples. It must not
                change before the codes are used.
            img_i: global index of the first example.
            n_patches: tokens per example.
            only: features whose codes are wanted, int64 (1 or more), on the encoder's device; None: all. The others do not
                leave the device; on the CPU most are not even encoded where none of them decides what another one is.

        Returns:
            The codes, once they are made. They raise ActivationOverflow where a value is NaN, infinite, or too large for a
            float32 product.
        """
        return self._pool.submit(self._encode, acts_bd, img_i, n_patches, only)

    @property
    def product(self) -> str:
        """Whose product it is: it decides how scores are rounded."""
        return "numpy" if self._by_numpy else "torch"

    @property
    def recomputed_per_token(self) -> float | None:
        """Entries that were made a second time, in fp32; None without `screen`."""
        return self._product.recomputed_per_token if isinstance(self._product, Screen) else None

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

    def _encode(self, acts_bd: Tensor, img_i: int, n_patches: int, only: Tensor | None) -> Codes:
        if encodes_at_once(self.device):
            with self._lane():
                return self._encode_at_once(acts_bd, img_i, n_patches, only).cpu()
        token_n, feature_n, value_n, n_blocks = self._encode_blocks(acts_bd, only)
        if n_blocks > 1:
            order_n = stable_order(feature_n, self.sae.d_sae)
            token_n, feature_n, value_n = token_n[order_n], feature_n[order_n], value_n[order_n]
        return Codes(
            token_n=token_n,
            feature_n=feature_n,
            value_n=value_n,
            img_i=img_i,
            n_imgs=len(acts_bd) // n_patches,
            n_patches=n_patches,
            acts_bd=acts_bd,
        )

    def _encode_at_once(self, acts_bd: Tensor, img_i: int, n_patches: int, only: Tensor | None) -> DeviceCodes:
        with self._lane():
            x_bd = acts_bd.to(self.device, non_blocking=True)
            token_n, feature_n, value_n, _ = self._encode_blocks(x_bd, only)
            codes = DeviceCodes(
                token_n=token_n,
                feature_n=feature_n,
                value_n=value_n,
                img_i=img_i,
                n_imgs=len(acts_bd) // n_patches,
                n_patches=n_patches,
                acts_bd=acts_bd,
                x_bd=x_bd,
            )
            _ = codes.all_above  # here, where others wait less for it
            self.wait()  # so that codes can be used in any stream, and `acts_bd` again
        return codes

    def _encode_blocks(self, x_bd: Tensor, only: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """Token (from the first), feature and value of each nonzero code, block after block, on the device; and the blocks."""
        step, _, _ = block_shape(len(x_bd), self.sae.activation, self.sae.d_sae, self.device)
        parts = []
        for first in range(0, len(x_bd), step):
            token_n, feature_n, value_n = self._encode_block(x_bd[first : first + step], only)
            parts.append((token_n + first if first else token_n, feature_n, value_n))
        if len(parts) == 1:
            return *parts[0], 1
        token_n, feature_n, value_n = (torch.cat(part) for part in zip(*parts, strict=True))
        return token_n, feature_n, value_n, len(parts)

    def _encode_block(self, x_bd: Tensor, only: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Token (int64), feature (int64) and value (float32) of each nonzero code, on the device.

        On the CPU by feature, then token; on a GPU by token, then feature.
        """
        low, high = torch.stack(torch.aminmax(x_bd)).tolist()
        if not max(-low, high) < self._limit:  # NaN and infinity travel through aminmax
            raise ActivationOverflow(self._limit)
        x_bd = self._normalised(x_bd)
        return self._finish(*(self._select_at_once(x_bd) if encodes_at_once(self.device) else self._select(x_bd, only)), only)

    def _normalised(self, x_bd: Tensor) -> Tensor:
        """Tokens on the device as the product takes them."""
        if isinstance(self.sae.input_norm, LayerNorm | ConstantNorm):
            x_bd = self.sae.input_norm.apply(x_bd)
        return x_bd.to(self.dtype)

    def _finish(
        self, token_n: Tensor, feature_n: Tensor, value_n: Tensor, only: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The codes of what was selected: the wanted ones, of their values."""
        activation = self.sae.activation
        if isinstance(activation, Gated):
            value_n = value_n * self._mag_scale_s[feature_n] + self._mag_shift_s[feature_n]
        keep_n = value_n > 0 if isinstance(activation, Gated) or (isinstance(activation, TopK) and activation.relu) else None
        if only is not None:
            wanted_n = torch.isin(feature_n, only)
            keep_n = wanted_n if keep_n is None else keep_n & wanted_n
        if keep_n is not None:
            kept_x = keep_n.nonzero().squeeze(1)
            token_n, feature_n, value_n = token_n[kept_x], feature_n[kept_x], value_n[kept_x]
        return token_n, feature_n, value_n

    def _select(self, x_bd: Tensor, only: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n_tokens, d_sae, activation = len(x_bd), self.sae.d_sae, self.sae.activation
        blocks = feature_blocks(n_tokens, activation, d_sae, self.device, only)
        threshold: Bound = self._threshold.float().numpy() if isinstance(self._threshold, Tensor) else self._threshold
        product = self._made_product()
        prepared = product.prepare(x_bd)
        exact = partial(product.recompute, x_bd=x_bd) if isinstance(product, Screen) else None
        sieve = Sieve(activation, 0.0 if exact else threshold, n_tokens, d_sae, exact)
        # Features are rows, so that codes are found in their final order; rows begin at cache lines, or the product is slow.
        width = -(-n_tokens // 16) * 16
        largest = max(features.stop - features.start for features in blocks)
        block_cw = self._block(largest * width, product.dtype).view(largest, width)
        for features in blocks:
            if self._is_closing:  # nobody waits for this any more
                raise CancelledError
            h_cw = block_cw[: features.stop - features.start]
            margin = product.into(h_cw[:, :n_tokens], features, prepared)
            sieve.take(features.start, (h_cw if product.dtype == torch.float32 else h_cw.view(torch.int16)).numpy(), margin)
        candidates = sieve.candidates()
        if exact:
            candidates = exact(candidates)
        if exact or isinstance(activation, TopK | GroupMax):  # of the others every candidate is a code
            kept_n = keep(activation, threshold, candidates, n_tokens, d_sae)
            candidates = candidates[0][kept_n], candidates[1][kept_n], candidates[2][kept_n]
        token_n, feature_n, value_n = (torch.from_numpy(part) for part in candidates)
        return token_n, feature_n, value_n

    def _made_product(self) -> Product:
        """Made at first use: who has nothing to encode, as a merge, need not hold the weights twice."""
        with self._making:
            if self._product is None:
                assert self._w_ds is not None
                make: Callable[[Tensor, Tensor], Product] = NumpyProduct if self._by_numpy else TorchProduct
                self._product, self._w_ds = make(self._w_ds, self._b_s), None
            return self._product

    def _select_at_once(self, x_bd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self._w_ds is not None
        n_tokens, d_sae = len(x_bd), self.sae.d_sae
        h_bs = self._block(n_tokens * d_sae, self.dtype).view(n_tokens, d_sae)
        torch.addmm(self._b_s, x_bd, self._w_ds, out=h_bs)
        return select_at_once(h_bs, self.sae.activation, self._threshold)

    @contextmanager
    def _lane(self) -> Iterator[None]:
        """Inside, what this thread does on a GPU is in its own stream."""
        if self.device.type != "cuda":
            yield
            return
        self._own.stream = self._own.stream or _stream(torch.cuda.current_device(), next(self._lanes))
        with torch.cuda.stream(self._own.stream):
            yield

    def _block(self, n_codes: int, dtype: torch.dtype) -> Tensor:
        """This thread's block of a type, flat, kept for the whole run: a fresh array is paged in anew each time."""
        blocks = self._own.blocks
        if dtype not in blocks or len(blocks[dtype]) < n_codes:
            blocks.pop(dtype, None)  # first, or both are there for a moment
            blocks[dtype] = torch.zeros(n_codes, device=self.device, dtype=dtype)
        return blocks[dtype][:n_codes]


class _Own(threading.local):
    """What each thread has for itself: blocks by type, and on a GPU a stream."""

    def __init__(self) -> None:
        self.blocks: dict[torch.dtype, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None


@cache
def _stream(index: int, lane: int) -> torch.cuda.Stream:
    """A lane's stream, the same for all encoders: cuBLAS keeps a workspace of 8 to 32 MiB for each that it has seen."""
    return torch.cuda.Stream(index)


def _not_above(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded down to a type: of that type's numbers, those above the result are those above `x`."""
    nearest = x.to(dtype)
    return torch.where(nearest > x, torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)), nearest)


def _begin(index: int | None) -> None:
    """Set up a thread of the pool: torch has these settings for each, MKL's threads and the GPU that it uses."""
    torch.set_num_threads(1)
    if index is not None:
        torch.cuda.set_device(index)


def batch_threads(device: torch.device) -> int:
    """Most threads that encode batches side by side: pieces of them on the CPU, whole ones on a GPU."""
    return LANES if encodes_at_once(device) else cpu_threads()
