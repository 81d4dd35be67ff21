"""SAEs of both activations of this release of sparsify: `python write_sparsify.py DIR`.

It runs where sparsify is installed and ours is not.
"""

import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

D_MODEL = 16


def main(out: Path) -> None:
    torch.manual_seed(0)
    for activation, transcode, skip in product(("topk", "groupmax"), (False, True), (False, True)):
        path = out / f"{activation}{'-transcode' if transcode else ''}{'-skip' if skip else ''}"
        config = SparseCoderConfig(activation=activation, expansion_factor=4, k=4, transcode=transcode, skip_connection=skip)
        sae = SparseCoder(D_MODEL, config, device="cpu")
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        sae.save_to_disk(path)
        x_bd = torch.randn(48, D_MODEL)
        found = SparseCoder.load_from_disk(path, device="cpu").encode(x_bd)
        feats_bs = torch.zeros(len(x_bd), sae.num_latents).scatter_(1, found.top_indices, found.top_acts.detach())
        save_file({"x": x_bd, "feats": feats_bs}, path / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
