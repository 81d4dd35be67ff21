"""PURE. The contract of an accumulator, and the sparse codes that it is fed.

To add a statistic: one file with a class that derives from `Accumulator`, one line in `statistics.make_bundle`, one line in
`tests/laws.py`, whose battery then tests it; CONTRIBUTING.md has the rest. It works on a GPU too; `update_on_device` makes it
fast there.

Names: `b` tokens, `d` model width, `n` codes, `s` features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saev_dist.errors import MergeError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Codes:
    """The nonzero codes of consecutive whole examples."""

    token_n: Tensor
    """int64 (n,): token counted from the first of `img_i`, `(image - img_i) * n_patches + patch`."""
    feature_n: Tensor
    """int64 (n,)."""
    value_n: Tensor
    """float32 (n,), never 0, finite; negative only from a raw TopK."""
    img_i: int
    """Global index of the first image."""
    n_imgs: int
    n_patches: int
    """Content tokens per image."""
    acts_bd: Tensor
    """float32 (tokens, d_model), on the CPU: what the codes were encoded from; valid during `update` only."""

    @property
    def n_tokens(self) -> int:
        return self.n_imgs * self.n_patches

    @cached_property
    def all_above(self) -> bool:
        """Whether all values are above zero. It waits for a device."""
        return not len(self.value_n) or bool(self.value_n.amin() > 0)


class Codes(_Codes):
    """The nonzero codes of a batch, or of a piece of one, on the CPU: by feature, then by token.

    Statistics are kept by feature, so that in this order they are gathered and counted in sequence.
    """

    @cached_property
    def is_first_n(self) -> NDArray[np.bool_]:
        """Whether a code is the first of its feature, bool (n,)."""
        return changes(self.feature_n.numpy())

    def by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token, feature and value, ordered by token, then by feature."""
        order_n = stable_order(self.token_n, self.n_tokens)
        return self.token_n[order_n], self.feature_n[order_n], self.value_n[order_n]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceCodes(_Codes):
    """The nonzero codes of a batch on the device that encoded it, where that is not the CPU: by token, then by feature."""

    x_bd: Tensor
    """`acts_bd` on the device."""

    def split(self, n_imgs: int) -> "Iterator[DeviceCodes]":
        """The codes of so many images at a time, as batches of their own."""
        if self.n_imgs <= n_imgs:
            yield self
            return
        firsts = range(0, self.n_imgs, n_imgs)
        first_e = torch.tensor(firsts[1:], device=self.token_n.device) * self.n_patches
        cuts = [0, *torch.searchsorted(self.token_n, first_e).tolist(), len(self.token_n)]
        for first, (low, high) in zip(firsts, pairwise(cuts), strict=True):
            tokens = slice(first * self.n_patches, (first + n_imgs) * self.n_patches)
            yield DeviceCodes(
                token_n=self.token_n[low:high] - tokens.start,
                feature_n=self.feature_n[low:high],
                value_n=self.value_n[low:high],
                img_i=self.img_i + first,
                n_imgs=min(n_imgs, self.n_imgs - first),
                n_patches=self.n_patches,
                acts_bd=self.acts_bd[tokens],
                x_bd=self.x_bd[tokens],
            )

    def cpu(self) -> Codes:
        """The same on the CPU."""
        token_n, feature_n, value_n = to_cpu(self.token_n, self.feature_n, self.value_n)
        order_n = stable_order(feature_n, int(feature_n.max()) + 1 if len(feature_n) else 1)
        return Codes(
            token_n=token_n[order_n],
            feature_n=feature_n[order_n],
            value_n=value_n[order_n],
            img_i=self.img_i,
            n_imgs=self.n_imgs,
            n_patches=self.n_patches,
            acts_bd=self.acts_bd,
        )


def changes(key_n: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each key differs from the one before; the first does."""
    changes_n = np.ones(len(key_n), dtype=bool)
    np.not_equal(key_n[1:], key_n[:-1], out=changes_n[1:])
    return changes_n


def to_cpu(*tensors: Tensor) -> list[Tensor]:
    """Copies on the CPU, made all at once where they come from a GPU."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # from a GPU: into page-locked memory
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def stable_order(key_n: Tensor, limit: int) -> Tensor:
    """What sorts int64 keys of 0 … limit-1, equal ones staying in order: int64 (n,).

    NumPy sorts integers of 16 bits by radix, several times as fast as wider ones by comparison.
    """
    key = key_n.numpy()
    order_n = np.argsort(key.astype(np.uint16), kind="stable")
    for shift in range(16, (limit - 1).bit_length(), 16):
        order_n = order_n[np.argsort((key[order_n] >> shift).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order_n)


class Accumulator(ABC):
    """A commutative monoid over batches: fold in any order, in any grouping, on any number of ranks.

    The constructor makes the empty state. State is a set of CPU tensors, the attributes named in `STATE`. Dim 0
    of each is made of independent rows (features, mostly): `merge` of row slices is the row slice of `merge`,
    which is what lets ranks exchange and merge slices. Integer state makes sums associative to the bit.
    """

    STATE: ClassVar[tuple[str, ...]]
    SETTINGS: ClassVar[tuple[str, ...]] = ()
    """Attributes that operands of a merge must share."""

    def add(self, codes: Codes | DeviceCodes) -> None:
        """Fold one batch in, wherever its codes are."""
        if isinstance(codes, DeviceCodes):
            self.update_on_device(codes)
        else:
            self.update(codes)

    @abstractmethod
    def update(self, codes: Codes) -> None:
        """Fold one batch in."""

    def update_on_device(self, codes: DeviceCodes) -> None:
        """Fold one batch in whose codes are on a GPU.

        This one brings all codes to the CPU. A statistic that should not slow a GPU down overrides it: it counts on the
        device, puts into its state what it counted when `flush` is called, and drops that in `load_state_dict`.
        """
        self.update(codes.cpu())

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """The state over the batches of both, which must be disjoint; neither operand changes."""

    @abstractmethod
    def finalize(self, n_tokens: int) -> dict[str, Any]:
        """Artifacts from the state over all `n_tokens` tokens of the data.

        A file stem maps to what `torch.save` writes; "metrics" maps to numbers that go into metrics.json.
        """

    def flush(self) -> None:
        """Fold in what updates may have put off. `state_dict`, `check_same_kind` (so each merge) and a bundle's `finalize` call
        it before the state is read."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state's tensors, not copied."""
        self.flush()
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a state over, tensors not copied; it may have any number of rows (a slice).

        Raises:
            MergeError: a tensor is missing, or differs in dtype or in the shape of a row.
        """
        for name in self.STATE:
            mine = getattr(self, name)
            other = state.get(name)
            if other is None or other.dtype != mine.dtype or other.shape[1:] != mine.shape[1:]:
                found = "nothing" if other is None else f"{other.dtype} {tuple(other.shape)}"
                raise MergeError(f"{type(self).__name__}.{name}: found {found}; expected {mine.dtype} {tuple(mine.shape)}.")
        for name in self.STATE:
            setattr(self, name, state[name])

    def like(self, state: dict[str, Tensor]) -> Self:
        """An accumulator of these settings and that state."""
        other = copy(self)
        other.load_state_dict(state)
        return other

    def check_same_kind(self, other: "Accumulator") -> None:
        """Flush both, and raise MergeError unless `other` is of this type, these settings, and tensors of these shapes."""
        if type(self) is not type(other):
            raise MergeError(f"cannot merge {type(self).__name__} with {type(other).__name__}.")
        for name in self.SETTINGS:
            if getattr(self, name) != getattr(other, name):
                raise MergeError(
                    f"cannot merge {type(self).__name__} of {name} {getattr(self, name)} with {getattr(other, name)}."
                )
        mine, theirs = ({k: tuple(v.shape) for k, v in acc.state_dict().items()} for acc in (self, other))
        if mine != theirs:
            raise MergeError(f"cannot merge {type(self).__name__} of shapes {mine} with one of {theirs}.")
