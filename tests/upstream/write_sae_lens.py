"""SAEs of all architectures and normalisations of this release of SAELens: `python write_sae_lens.py DIR`.

It runs where SAELens is installed and ours is not.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

D_MODEL, D_SAE, K, SCALE = 16, 32, 4, 0.25
NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
# What configs want to be told, in one release or another.
WANTED = {
    "d_in": D_MODEL, "d_out": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "k": K,
    "matryoshka_widths": [8, D_SAE], "model_name": "m", "hook_name": "h", "hook_layer": 0, "hook_head_index": None,
    "prepend_bos": True, "dataset_path": "d", "dataset_trust_remote_code": True, "context_size": 8,
    "activation_fn": "relu", "activation_fn_str": "relu", "finetuning_scaling_factor": False,
    "sae_lens_training_version": "test", "l1_coefficient": 1.0, "lp_norm": 1.0, "use_ghost_grads": False,
    "normalize_sae_decoder": False, "noise_scale": 0.0, "decoder_orthogonal_init": False,
    "mse_loss_normalization": None, "decoder_heuristic_init": False, "decoder_heuristic_init_norm": 0.1,
    "init_encoder_as_decoder_transpose": False, "scale_sparsity_penalty_by_decoder_norm": False,
    "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.1,
}  # fmt: skip


def make(kind: type, config: type, **said: Any) -> Any:
    """An SAE with random weights."""
    known = {field.name for field in fields(config)}
    values = {name: value for name, value in (WANTED | said).items() if name in known}
    for field in fields(config):
        if field.init and field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{config.__name__} wants {field.name}, of which this script knows nothing")
    sae = kind(config(**values))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            small = name.startswith("b_") or name in ("r_mag", "log_threshold")
            parameter.copy_(torch.randn_like(parameter) * (0.1 if small else 0.4))
        for name, tensor in sae.state_dict().items():
            if name in ("threshold", "topk_threshold"):
                tensor.fill_(0.5)
    return sae


Made = tuple[str, Any, Callable[[Path], object], Callable[[torch.Tensor], torch.Tensor]]
"""Name, normalisation, what saves it, and what encodes."""


def of_version_6() -> Iterator[Made]:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    kinds = [("training", *item) for item in SAE_TRAINING_CLASS_REGISTRY.items()]
    kinds += [("inference", *item) for item in SAE_CLASS_REGISTRY.items()]
    for (stage, architecture, (kind, config)), norm, subtracts in product(kinds, NORMS, (True, False)):
        name = f"{stage}-{architecture}-{norm}-{'pre' if subtracts else 'nopre'}"
        try:
            sae = make(kind, config, normalize_activations=norm, apply_b_dec_to_input=subtracts)
        except (ValueError, AssertionError) as err:
            print(f"not made: {name}: {err!r}")
            continue
        finish = sae.save_inference_model if stage == "training" else sae.save_model
        yield name, norm, sae.save_model, partial(encode_saved, finish)
        if stage == "training":
            yield f"{name}-saved", norm, finish, partial(encode_saved, finish)


def encode_saved(save: Callable[[str], object], x_bd: torch.Tensor) -> torch.Tensor:
    """What is saved can be loaded, unlike some checkpoints of training."""
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as name:
        save(name)
        return SAE.load_from_disk(name).encode(x_bd)


def of_version_3_to_5() -> Iterator[Made]:
    from sae_lens import SAE, SAEConfig
    from sae_lens.training.training_sae import TrainingSAE, TrainingSAEConfig

    kinds = [("training", TrainingSAE, TrainingSAEConfig), ("inference", SAE, SAEConfig)]
    architectures = ("standard", "gated", "jumprelu", "topk")
    for (stage, kind, config), architecture, norm, subtracts in product(
        kinds, architectures, (*NORMS, False, True), (True, False)
    ):
        said = {"architecture": architecture, "normalize_activations": norm, "apply_b_dec_to_input": subtracts}
        if architecture == "topk":  # by its function
            said |= {"architecture": "standard", "activation_fn_kwargs": {"k": K}}
            said |= {"activation_fn": "topk", "activation_fn_str": "topk"}
        sae = make(kind, config, **said)
        encode = sae.encode
        if hasattr(sae, "log_threshold"):  # 4.1.0 to 4.3.2 encode with another one, which is not trained
            encode = lambda x, sae=sae: sae.encode_with_hidden_pre_fn(x)[0]  # noqa: E731
        name = f"{stage}-{architecture}-{norm}-{'pre' if subtracts else 'nopre'}"
        yield name, norm, lambda path, sae=sae: sae.save_model(str(path)), encode


def main(out: Path) -> None:
    import sae_lens

    torch.manual_seed(0)
    is_new = int(sae_lens.__version__.split(".")[0]) >= 6
    for name, norm, save, encode in of_version_6() if is_new else of_version_3_to_5():
        path = out / name
        path.mkdir(parents=True)
        save(path)
        scale = 1.0
        if is_new and norm == "expected_average_only_in":
            from sae_lens.training.activation_scaler import ActivationScaler

            scale = SCALE
            ActivationScaler(scaling_factor=scale).save(str(path / "activation_scaler.json"))
        x_bd = torch.randn(48, D_MODEL) / scale
        feats_bs = encode(x_bd * scale)
        save_file({"x": x_bd, "feats": feats_bs.detach().float().contiguous()}, path / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
