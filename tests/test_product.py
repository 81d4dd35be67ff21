"""The two products: the same to rounding, the bias in both, and which one is used where."""

import json
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from saev_dist import extract, job
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.estimate import estimate
from saev_dist.plan import Plan
from saev_dist.sae import product
from saev_dist.sae.encoder import Encoder
from saev_dist.sae.model import Precision, Relu, Sae, TopK
from saev_dist.sae.product import CHOOSERS, NumpyProduct, TorchProduct, arithmetic, numpy_is_faster, uses_numpy
from tests.ranks import artifact_hashes
from tests.synthetic import make_acts, make_sae, make_shards, make_weights

CPU = torch.device("cpu")
RANDOM = torch.Generator().manual_seed(0)
MAKERS = pytest.mark.parametrize("make", [TorchProduct, NumpyProduct])


def blas_threads() -> set[int]:
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


def block(n_features: int, n_tokens: int) -> torch.Tensor:
    """As the encoder has it: rows begin at cache lines."""
    return torch.full((n_features, -(-n_tokens // 16) * 16), torch.nan)[:, :n_tokens]


@MAKERS
@pytest.mark.parametrize("n_tokens", [1, 16, 37])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_block_is_the_product_of_its_features_with_bias(make, n_tokens, transposed):
    w_ds, b_s = torch.randn(50, 130, generator=RANDOM), torch.randn(130, generator=RANDOM)
    x_bd = torch.randn(n_tokens, 50, generator=RANDOM)
    made = make(w_ds.T.contiguous().T if transposed else w_ds, b_s)
    expected_bs = x_bd.double() @ w_ds.double() + b_s.double()
    for first, stop in ((0, 64), (64, 130)):
        out_cb = block(stop - first, n_tokens)
        made.into(out_cb, slice(first, stop), made.prepare(x_bd))
        torch.testing.assert_close(out_cb.double(), expected_bs[:, first:stop].T, rtol=1e-5, atol=1e-5)


@MAKERS
@pytest.mark.parametrize("kind", [Relu(), TopK(4)], ids=str)
def test_the_encoder_makes_the_same_codes_with_either(monkeypatch, make, kind):
    sae = Sae(**make_weights(), activation=kind, pre_bias=True, source="integers")
    acts_bd = torch.from_numpy(make_acts(11)).view(-1, sae.d_model)
    monkeypatch.setattr(product, "numpy_is_faster", lambda: make is NumpyProduct)
    with Encoder(sae, CPU, "fp32", 2) as one:
        assert one.product == ("numpy" if make is NumpyProduct else "torch")
        codes = one.encode(acts_bd, img_i=0, n_patches=5)
    assert isinstance(one._product, make)
    h_bs = (acts_bd - sae.b_dec_d) @ sae.w_enc_ds + sae.b_enc_s  # of integers, so exact
    expected_bs = h_bs.relu()
    if isinstance(kind, TopK):
        order_bk = h_bs.argsort(dim=1, descending=True, stable=True)[:, :4]
        expected_bs = torch.zeros_like(h_bs).scatter(1, order_bk, h_bs.gather(1, order_bk))
    found_bs = torch.zeros_like(h_bs).index_put((codes.token_n, codes.feature_n), codes.value_n)
    assert torch.equal(found_bs, expected_bs) and len(codes.value_n) == int((expected_bs != 0).sum())


@pytest.mark.skipif(not blas_threads(), reason="threadpoolctl knows of no BLAS here")
def test_numpy_has_one_thread_inside_an_encoder_and_its_own_number_after_it():
    sae = Sae(**make_weights(), activation=Relu(), pre_bias=False, source="integers")
    with threadpool_limits(2, "blas"):
        assert blas_threads() == {2}
        with Encoder(sae, CPU, "fp32", 2):
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_who_encodes_nothing_does_not_hold_the_weights_twice(monkeypatch):
    monkeypatch.setattr(product, "numpy_is_faster", lambda: True)
    sae = Sae(**make_weights(), activation=Relu(), pre_bias=False, source="integers")
    with Encoder(sae, CPU, "fp32", 2) as one:
        assert one._product is None
        one.encode(torch.zeros(5, sae.d_model), img_i=0, n_patches=5)
    assert isinstance(one._product, NumpyProduct) and one._w_ds is None


@MAKERS
def test_a_run_says_whose_product_it_is_and_has_the_same_bytes_with_any_threads(monkeypatch, tmp_path, make):
    monkeypatch.setattr(product, "numpy_is_faster", lambda: make is NumpyProduct)
    acts = np.random.default_rng(6).normal(size=(60, 9, 96)).astype(np.float32)
    shards, sae = make_shards(tmp_path / "shards", acts), make_sae(tmp_path / "sae.pt", d_model=96, d_sae=1001)
    hashes = []
    for n_threads in (1, 3):
        monkeypatch.setattr(job, "batch_threads", lambda device, n=n_threads: n)
        out = tmp_path / str(n_threads)
        extract.run(Extract(shards=shards, sae=sae, out=out, batch_tokens=90, device="cpu", progress=False, self_check="off"))
        hashes.append(artifact_hashes(out))
        (rank,) = json.loads((out / "manifest.json").read_text())["ranks"]
        assert rank["product"] == ("numpy" if make is NumpyProduct else "torch")
    assert hashes[0] == hashes[1]


def test_the_copy_of_the_weights_is_counted(tmp_path):
    shards = Shards.open(make_shards(tmp_path / "shards", make_acts(3)))
    sae = Sae(**make_weights(), activation=Relu(), pre_bias=False, source="")
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path)
    with_copy, without = (
        estimate(replace(cfg, precision=precision), shards, sae, Plan(shards.examples, 1), CPU, 1).host
        for precision in ("fp32", "bf16")
    )
    (name,) = set(with_copy) - set(without)
    assert with_copy[name] >= NumpyProduct(sae.w_enc_ds, sae.b_enc_s)._w_se.nbytes


ZEN_3 = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 fma\n"


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """Makes this machine's /proc/cpuinfo say something; None: there is none."""

    def say(text: str | None) -> None:
        fpath = tmp_path / "cpuinfo"
        if text is not None:
            fpath.write_text(text)
        monkeypatch.setattr(product, "CPUINFO", fpath)
        numpy_is_faster.cache_clear()

    yield say
    monkeypatch.undo()
    numpy_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("text", "blas", "layer", "is_faster"),
    [
        (ZEN_3, "scipy-openblas", "pthreads", True),
        (ZEN_3 * 2, "scipy-openblas", "pthreads", True),
        (ZEN_3, "scipy-openblas", "openmp", False),
        (ZEN_3, "scipy-openblas", None, False),
        (ZEN_3, "openblas", "pthreads", False),
        (ZEN_3, "mkl", "pthreads", False),
        (ZEN_3.replace("avx2", "avx2 avx512f"), "scipy-openblas", "pthreads", True),
        (ZEN_3.replace("avx2", ""), "scipy-openblas", "pthreads", False),
        (ZEN_3.replace("AuthenticAMD", "GenuineIntel"), "scipy-openblas", "pthreads", False),
        ("processor\t: 0\nFeatures\t: asimd\n", "scipy-openblas", "pthreads", False),
        (None, "scipy-openblas", "pthreads", False),
    ],
)
def test_numpy_multiplies_where_it_was_measured_to_be_faster(cpu, monkeypatch, text, blas, layer, is_faster):
    monkeypatch.setattr(np, "show_config", lambda mode: {"Build Dependencies": {"blas": {"name": blas}}})
    lib = {"internal_api": "openblas", "threading_layer": layer, "version": "1", "architecture": "Zen", "filepath": "/lib/a.so"}
    libs = [lib] if layer else []
    monkeypatch.setattr(product, "threadpool_info", lambda: libs)
    cpu(text)
    assert numpy_is_faster() == is_faster
    assert uses_numpy(CPU, "fp32", screen=False) == is_faster
    assert not uses_numpy(CPU, "bf16", screen=False) and not uses_numpy(CPU, "fp32", screen=True)
    assert not uses_numpy(torch.device("cuda"), "fp32", screen=False)


def test_what_rounds_otherwise_is_called_otherwise(monkeypatch):
    numpys = {"internal_api": "openblas", "threading_layer": "pthreads", "version": "0.3.30", "architecture": "Zen"}
    numpys |= {"filepath": "/lib/numpy.libs/libscipy_openblas64_.so"}
    scipys = numpys | {"version": "0.3.28", "filepath": "/lib/scipy.libs/libscipy_openblas.so"}
    libs = [{"internal_api": "mkl"}, scipys, numpys]
    monkeypatch.setattr(product, "threadpool_info", lambda: libs)
    monkeypatch.setattr(product, "processor", lambda device: device.type)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    for chooser in chain(*CHOOSERS.values()):
        monkeypatch.delenv(chooser, raising=False)

    def name(*, device: str = "cpu", precision: Precision = "fp32", screen: bool = False, is_numpys: bool = True) -> str:
        monkeypatch.setattr(product, "numpy_is_faster", lambda: is_numpys)
        return arithmetic(torch.device(device), precision, screen=screen)

    def names() -> list[str]:
        others: list[dict[str, Any]] = [{"is_numpys": False}, {"screen": True}, {"precision": "bf16"}, {"device": "cuda"}]
        return [name(), *(name(**other) for other in others)]

    on_cpu, on_gpu = "cpu (torch 2.13.0)", "cuda (torch 2.13.0)"
    of_numpy = "cpu (torch 2.13.0, NumPy's OpenBLAS 0.3.30 Zen)"
    assert names() == [of_numpy, on_cpu, on_cpu, on_cpu, on_gpu]
    libs[2] = numpys | {"architecture": "Haswell"}  # as OPENBLAS_CORETYPE has it
    assert name() == "cpu (torch 2.13.0, NumPy's OpenBLAS 0.3.30 Haswell)"
    libs[1:] = [scipys, numpys | {"filepath": "/opt/libopenblas.so"}]  # whose is whose?
    assert name() == "cpu (torch 2.13.0, NumPy's OpenBLAS 0.3.28 Zen and 0.3.30 Zen)"
    libs[1:] = [numpys]
    for kind, choosers in CHOOSERS.items():
        for chooser in choosers:
            with monkeypatch.context() as patch:
                patch.setenv(chooser, "1")
                chosen = [one.replace(")", f", {chooser}=1)") if one.startswith(kind) else one for one in (on_cpu, on_gpu)]
                assert names() == [of_numpy, *[chosen[0]] * 3, chosen[1]]
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    assert name(device="cuda") == "cuda (torch 2.14.1)"


@pytest.mark.parametrize(("flags", "is_numpys"), [({}, True), ({"precision": "bf16"}, False), ({"screen": "bf16"}, False)])
def test_a_run_says_by_what_it_was_computed(monkeypatch, tmp_path, flags, is_numpys):
    monkeypatch.setattr(product, "numpy_is_faster", lambda: True)
    monkeypatch.setattr(product, "_openblas", lambda: "of a test")
    shards, sae = make_shards(tmp_path / "shards", make_acts(4)), make_sae(tmp_path / "sae.pt")
    extract.run(Extract(shards=shards, sae=sae, out=tmp_path / "run", device="cpu", progress=False, self_check="off", **flags))
    (rank,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["ranks"]
    (said,) = rank["arithmetic"]
    assert ("NumPy's OpenBLAS of a test" in said) == is_numpys and f"torch {torch.__version__}" in said
