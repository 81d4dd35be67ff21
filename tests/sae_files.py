"""SAE files of other programs, what these programs computed of them, and how to spoil them."""

import json
from pathlib import Path

import torch

from saev_dist.sae.encoder import Encoder
from saev_dist.sae.load import Overrides, load_sae
from saev_dist.sae.model import Sae
from saev_dist.sae.safetensors import read_safetensors, write_safetensors

DATA = Path(__file__).parent / "data" / "sae-formats"
CPU = torch.device("cpu")


def encode(sae: Sae, x_bd: torch.Tensor) -> torch.Tensor:
    """Dense codes, float32 (b, s), of the program's encoder."""
    with Encoder(sae, CPU, "fp32", 1) as encoder:
        codes = encoder.encode(x_bd, img_i=0, n_patches=1)
    dense_bs = torch.zeros(len(x_bd), sae.d_sae)
    dense_bs[codes.token_n, codes.feature_n] = codes.value_n
    return dense_bs


def load(path: Path, **said) -> Sae:
    return load_sae(path, Overrides(**said)).sae


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and features that the original program computed."""
    return expected_in(DATA / name)


def expected_in(dpath: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tensors, _ = read_safetensors(dpath / "expected.safetensors")
    return tensors["x"], tensors["feats"]


def same_features(found_bs: torch.Tensor, expected_bs: torch.Tensor, atol: float = 1e-6) -> None:
    assert expected_bs.any()
    assert torch.equal(found_bs > 0, expected_bs > 0)
    torch.testing.assert_close(found_bs, expected_bs, rtol=1e-5, atol=atol)


def edit(fpath: Path, /, **changes: object) -> None:
    """Change members of a JSON file (of its "trainer", where it has one); None removes one."""
    content = json.loads(fpath.read_text())
    target = content.get("trainer", content)
    for key, value in changes.items():
        target.pop(key) if value is None else target.__setitem__(key, value)
    fpath.write_text(json.dumps(content))


def edit_tensors(fpath: Path, /, **changes: torch.Tensor | None) -> None:
    """Change tensors of a safetensors file or a state dict; None removes one."""
    is_torch = fpath.suffix == ".pt"
    tensors = dict(torch.load(fpath, weights_only=True)) if is_torch else read_safetensors(fpath)[0]
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    torch.save(tensors, fpath) if is_torch else write_safetensors(fpath, tensors, {})
