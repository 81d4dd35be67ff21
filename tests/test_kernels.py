"""The Triton kernels do what plain torch does: on a GPU where there is one, else in Triton's interpreter."""

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saev_dist import fused
from saev_dist.accumulators import fixed_point, histogram, moments, rows
from saev_dist.accumulators.base import DeviceCodes
from saev_dist.accumulators.histogram import Histogram
from saev_dist.accumulators.moments import Moments
from saev_dist.sae import select
from saev_dist.sae.model import GroupMax, Relu, Threshold, TopK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: on a CPU only these tests do
kernels = pytest.importorskip("saev_dist.kernels", reason="no Triton")


@pytest.fixture
def using(monkeypatch):
    """Have a caller use the kernels, or plain torch."""

    def use(wanted):
        for module in (select, moments, histogram, rows):
            monkeypatch.setattr(module, "kernels_on", lambda device: wanted)

    return use


def product(n_tokens: int, d_sae: int, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(d_sae)
    h_bs = torch.randn(n_tokens, d_sae, generator=random)
    if kind == "ties":
        h_bs = (h_bs * 2).round() / 2  # zeros of both signs too
    elif kind == "far apart":
        h_bs = h_bs * torch.exp(torch.randn(n_tokens, d_sae, generator=random) * 12)
    elif kind == "below zero":
        h_bs = -h_bs.abs()
    elif kind == "all equal":
        h_bs = torch.full_like(h_bs, 1.5)
    elif kind == "extreme":
        tiny = 1e-40 if dtype == torch.float32 else 1e-30  # the interpreter has no subnormal numbers of bf16
        h_bs = torch.where(h_bs > 2, 3.0e38, torch.where(h_bs < -2, -3.0e38, h_bs * tiny))
    elif kind == "zeros":
        h_bs = h_bs * (torch.rand(n_tokens, d_sae, generator=random) < 0.02)
    return h_bs.to(DEVICE, dtype)


def same_codes(using, h_bs, activation, threshold=0.0):
    using(kernels)
    found = select.select_at_once(h_bs, activation, threshold)
    using(None)
    expected = select.select_at_once(h_bs, activation, threshold)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "far apart", "below zero", "all equal", "extreme", "zeros"])
@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (64, 64), (100, 7), (257, 1), (1200, 32)])
def test_the_k_largest(using, kind, dtype, d_sae, k):
    token_n, *_ = same_codes(using, product(2, d_sae, kind, dtype), TopK(k))
    if kind == "random":
        assert len(token_n) == 2 * k


@pytest.mark.parametrize(
    ("kind", "d_sae", "k"),
    [
        *((kind, *sizes) for kind in ("random", "ties", "extreme") for sizes in ((100, 7), (90, 20))),
        ("ties", 64, 8),
        ("ties", 129, 5),
        ("random", 130, 60),
    ],
)
def test_the_k_largest_of_several_parts(using, monkeypatch, kind, d_sae, k):
    monkeypatch.setattr(kernels, "PART", 32)
    monkeypatch.setattr(kernels, "GROUPS_AT_ONCE", 2)
    looked: list[bool] = []
    select_strongest = kernels.select_strongest

    def looking(*args):
        found = select_strongest(*args)
        looked.append(found is not None)
        return found

    monkeypatch.setattr(kernels, "select_strongest", looking)
    same_codes(using, product(2 if kind == "random" else 1, d_sae, kind), TopK(k))  # the interpreter needs seconds
    assert looked == [k != 60]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "all equal", "below zero"])
@pytest.mark.parametrize("d_sae", [1, 60, 300])
def test_what_exceeds_a_threshold(using, monkeypatch, kind, dtype, d_sae):
    monkeypatch.setattr(kernels, "PART_ABOVE", 128)
    monkeypatch.setattr(kernels, "GROUPS_AT_ONCE", 4)
    h_bs = product(3, d_sae, kind, dtype)
    same_codes(using, h_bs, Relu())
    same_codes(using, h_bs, Threshold(0.5), 0.5)
    same_codes(using, h_bs, Threshold(torch.zeros(d_sae)), torch.linspace(0, 1.5, d_sae).to(h_bs))


def test_the_largest_of_groups(using):
    same_codes(using, product(6, 60, "ties"), GroupMax(5))


VALUES = st.floats(-4, 2.0**61, width=32).filter(bool) | st.sampled_from(
    [2.0**-149, 2.0**-62, 1.5 * 2.0**-62, 2.5 * 2.0**-62, 2.0**-10 + 2.0**-33, 2.0**31 + 2.0**8, 2.0**62, 3.0e38, -1.0]
)
CODES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), VALUES), max_size=40, unique_by=lambda code: code[:2])


def codes_of(found, n_patches: int) -> DeviceCodes:
    """Of tokens, features and values: six tokens, four features."""
    columns = list(zip(*sorted(found), strict=True)) or [(), (), ()]
    parts = (
        torch.tensor(x, dtype=t, device=DEVICE) for x, t in zip(columns, (torch.int64, torch.int64, torch.float32), strict=True)
    )
    token_n, feature_n, value_n = parts
    x_bd = torch.zeros(6, 1)
    return DeviceCodes(
        token_n=token_n, feature_n=feature_n, value_n=value_n, img_i=0, n_imgs=6 // n_patches, n_patches=n_patches,
        acts_bd=x_bd, x_bd=x_bd.to(DEVICE),
    )  # fmt: skip


@given(CODES)
def test_counts(found):
    codes = codes_of(found, 3)
    sums_5s = torch.zeros(5, 4, dtype=torch.int64, device=DEVICE)
    counts_sh = torch.zeros(4, histogram.N_BINS, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        kernels.add_to_moments(sums_5s, codes.feature_n, codes.value_n)
        kernels.add_to_histogram(counts_sh, codes.feature_n, codes.value_n, histogram._SHIFT, histogram._FIRST - 1)
    expected, bins = Moments(4), Histogram(4, 50.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "kernels_on", lambda device: None)
        patch.setattr(histogram, "kernels_on", lambda device: None)
        for _ in range(2):
            expected.update_on_device(codes)
            bins.update_on_device(codes)
    assert torch.equal(sums_5s, expected._waiting_5s)
    assert torch.equal(counts_sh, bins._waiting_sh)
    above_n = codes.value_n > 0
    parts_4n = fixed_point.to_parts(codes.value_n[above_n].double())
    assert sums_5s.sum(dim=1).tolist() == [2 * int(above_n.sum()), *(2 * parts_4n.sum(dim=1)).tolist()]


@given(CODES, st.sampled_from([1, 2, 3, 6]))
def test_means_of_the_strongest(found, n_patches):
    codes = codes_of([code for code in found if 0 < code[2] < 1e38], n_patches)
    assert codes.all_above
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "kernels_on", lambda device: None)
        expected_g = rows._strongest_means(codes, 4)
        patch.setattr(rows, "kernels_on", lambda device: kernels)
        assert torch.equal(rows._strongest_means(codes, 4), expected_g)
    assert (expected_g > 0).sum() == len(
        {(token // n_patches, feature) for token, feature, value in found if 0 < value < 1e38}
    ) or (min((value for *_, value in found if value > 0), default=1) < 1e-37)


def test_kernels_that_fail_or_err_are_not_used(monkeypatch, capsys):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
        monkeypatch.setattr(fused, "_try", lambda kernels, device, to=fused._try: to(kernels, torch.device("cpu")))
    look = fused.kernels_on.__wrapped__
    assert look(torch.device("cpu")) is None
    assert look(torch.device("cuda")) is kernels
    assert capsys.readouterr().err == ""
    write = kernels._strongest

    def wrong(*args):
        feature_bk, value_bk = write(*args)
        return feature_bk.flip(1), value_bk

    monkeypatch.setattr(kernels, "_strongest", wrong)
    assert look(torch.device("cuda")) is None
    assert "Triton does not work here (it finds other codes)" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "_strongest", write)
    for name, broken, words in (
        ("add_to_moments", lambda *_: None, "it adds up otherwise"),
        ("add_to_histogram", lambda *_: None, "it counts otherwise"),
        ("strongest_means", lambda *_: torch.zeros(3), "it counts otherwise"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, broken)
            assert look(torch.device("cuda")) is None
        assert f"Triton does not work here ({words})" in capsys.readouterr().err
    for missing, is_said in (("triton", False), ("another", True)):
        with monkeypatch.context() as patch:
            patch.setattr(
                fused, "_try", lambda *_, name=missing: (_ for _ in ()).throw(ModuleNotFoundError(f"no {name}", name=name))
            )
            assert look(torch.device("cuda")) is None
        assert (f"Triton does not work here (no {missing})" in capsys.readouterr().err) == is_said
    monkeypatch.setattr(kernels, "_strongest", lambda *_: 1 / 0)
    assert look(torch.device("cuda")) is None
    assert re.search(r"warning: Triton does not work here \(division by zero\); .* takes longer\.\n$", capsys.readouterr().err)
