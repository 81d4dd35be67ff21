"""A sparse autoencoder in memory: its weights and the rules to read them under. `encoder` applies them.

Names: `b` tokens, `d` model width, `s` features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16"]

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
    relu_of_top_k: bool = True
    """Whether a top-k of its program drops what is not above zero: what --activation topk:K then means."""
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
