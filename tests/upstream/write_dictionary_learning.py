"""SAEs as each trainer of this release of dictionary_learning leaves them: `python write_dictionary_learning.py DIR`.

It runs where dictionary_learning is installed and ours is not.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from safetensors.torch import save_file

D_MODEL, STEPS = 16, 60
COMMON = {
    "steps": STEPS, "activation_dim": D_MODEL, "dict_size": 32, "layer": 1, "lm_name": "m", "device": "cpu", "warmup_steps": 5,
}  # fmt: skip
SPARSE = {"sparsity_warmup_steps": 5}
ANNEALED = {**SPARSE, "anneal_start": 20, "n_sparsity_updates": 2, "p_end": 0.2}
TRAINERS = [
    (StandardTrainer, SPARSE),
    (StandardTrainerAprilUpdate, SPARSE),
    (TopKTrainer, {"k": 4, "threshold_start_step": 10}),
    (BatchTopKTrainer, {"k": 4, "threshold_start_step": 10}),
    (BatchTopKTrainer, {"k": 4}),  # whose threshold was never set
    (MatryoshkaBatchTopKTrainer, {"k": 4, "group_fractions": [0.25, 0.75], "threshold_start_step": 10}),
    (JumpReluTrainer, SPARSE),
    (GatedSAETrainer, SPARSE),
    (GatedAnnealTrainer, ANNEALED),
    (PAnnealTrainer, ANNEALED),
]


def tokens() -> Iterator[torch.Tensor]:
    directions = torch.randn(12, D_MODEL)
    while True:
        yield ((torch.rand(256, 12) < 0.2) * torch.rand(256, 12) * 3) @ directions + 0.3


def main(out: Path) -> None:
    torch.manual_seed(0)
    data = tokens()
    for i, (trainer, said) in enumerate(TRAINERS):
        for scaled in (False, True):
            path = out / f"{i}-{trainer.__name__}{'-scaled' if scaled else ''}"
            kept = path.parent.parent / "training" / path.name
            configs = [{"trainer": trainer, **COMMON, **said}]
            trainSAE(data, configs, steps=STEPS, save_dir=str(kept), normalize_activations=scaled, device="cpu")
            path.parent.mkdir(exist_ok=True)
            (kept / "trainer_0").rename(path)
            sae, config = load_dictionary(str(path), "cpu")
            if config["trainer"]["dict_class"] == "AutoEncoder":  # as its weights are stored
                sae = AutoEncoder.from_pretrained(str(path / "ae.pt"), device="cpu", normalize_decoder=False)
            x_bd = next(data)[:48]
            save_file({"x": x_bd, "feats": sae.encode(x_bd).detach().contiguous()}, path / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
