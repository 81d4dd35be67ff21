"""The product of a block of features, in fp32 on the CPU: by torch's BLAS, or by NumPy's where that is faster.

torch brings MKL and NumPy brings OpenBLAS. On AMD's processors OpenBLAS makes the same blocks, bias included, faster: 1.11 to
1.18 times on Zen 3 (AVX2), 2.10 to 2.14 times on Zen 5, whose AVX-512 MKL leaves alone, and 1.12 to 1.16 times there where
OpenBLAS is told to do the same (medians, one thread, 768 and 1,024 wide). Which one is used follows from the processor and
the libraries, never from a measurement: it decides how sums are rounded, and a run's bytes must not depend on what else a
machine did when the run began.

Names: `b` tokens, `c` features of a block, `d` model width, `e` the same and one more, `s` features.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

from saev_dist.machine import CPUINFO, processor, read
from saev_dist.sae.model import Precision
from saev_dist.sae.sieve import Margin

CHOOSERS = {
    "cuda": ("NVIDIA_TF32_OVERRIDE",),
    "cpu": ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE"),
}
"""Environment variables by which torch's libraries may multiply in another way, by kind of device."""


class Product(Protocol):
    """Products of tokens with an encoder's weights, plus its bias. (A third one is `screen.Screen`.)"""

    dtype: torch.dtype
    """Of a block of them."""

    def prepare(self, x_bd: Tensor) -> Any:
        """Tokens as `into` takes them."""

    def into(self, out_cb: Tensor, features: slice, prepared: Any) -> Margin | None:
        """Write the product of some features, plus bias; how far its entries may be off, or None: they are exact."""


class TorchProduct:
    """By `torch.addmm`.

    Args:
        w_ds: (d, s).
        b_s: (s,), of the same type.
    """

    def __init__(self, w_ds: Tensor, b_s: Tensor) -> None:
        self._w_ds, self._b_s, self.dtype = w_ds, b_s, w_ds.dtype

    def prepare(self, x_bd: Tensor) -> Tensor:
        return x_bd

    def into(self, out_cb: Tensor, features: slice, prepared: Tensor) -> None:
        torch.addmm(self._b_s[features, None], self._w_ds[:, features].T, prepared.T, out=out_cb)


class NumpyProduct:
    """By `np.matmul`, float32. It adds no bias: that is one more column of the weights, and a 1 after each token.

    Args:
        w_ds: float32 (d, s).
        b_s: float32 (s,).

    Memory: the weights once more.
    """

    dtype = torch.float32

    def __init__(self, w_ds: Tensor, b_s: Tensor) -> None:
        self._w_se = torch.cat([w_ds.T, b_s[:, None]], dim=1).numpy()

    def prepare(self, x_bd: Tensor) -> Tensor:
        x_be = x_bd.new_empty(len(x_bd), x_bd.shape[1] + 1)
        x_be[:, :-1], x_be[:, -1] = x_bd, 1
        return x_be

    def into(self, out_cb: Tensor, features: slice, prepared: Tensor) -> None:
        np.matmul(self._w_se[features], prepared.numpy().T, out=out_cb.numpy())


def uses_numpy(device: torch.device, precision: Precision, *, screen: bool) -> bool:
    """Whether an `Encoder` of these settings multiplies with NumPy."""
    return device.type == "cpu" and precision == "fp32" and not screen and numpy_is_faster()


@cache
def numpy_is_faster() -> bool:
    """Whether this is a processor of AMD's, with AVX2, and NumPy has the OpenBLAS of its wheels, which may be kept to one
    thread: with several it rounds otherwise."""
    built: dict[str, Any] = np.show_config(mode="dicts")  # type: ignore[assignment]
    name = built.get("Build Dependencies", {}).get("blas", {}).get("name")
    cpu = read(CPUINFO)
    flags = set(" ".join(re.findall(r"^flags\s*:(.*)$", cpu, re.M)[:1]).split())
    return name == "scipy-openblas" and bool(_openblas()) and "AuthenticAMD" in cpu and "avx2" in flags


def arithmetic(device: torch.device, precision: Precision, *, screen: bool) -> str:
    """What decides how an `Encoder` of these settings rounds: where two runs differ in it, their last bits may."""
    makers = [f"torch {torch.__version__}"]
    if uses_numpy(device, precision, screen=screen):
        makers.append(f"NumPy's OpenBLAS {_openblas()}")
    else:
        makers += [f"{name}={os.environ[name]}" for name in CHOOSERS[device.type] if name in os.environ]
    return f"{processor(device)} ({', '.join(makers)})"


def _openblas() -> str:
    """Version of NumPy's OpenBLAS and the processor whose kernels it has chosen; "" where it has none with threads of its own.

    SciPy may have brought another; NumPy's wheels keep theirs in `numpy.libs`.
    """
    libs = [lib for lib in threadpool_info() if lib["internal_api"] == "openblas" and lib["threading_layer"] == "pthreads"]
    own = [lib for lib in libs if Path(lib["filepath"]).parent.name == "numpy.libs"] or libs
    return " and ".join(sorted(f"{lib['version']} {lib['architecture']}" for lib in own))
