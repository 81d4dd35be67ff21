"""What runs on a GPU: on one where there is one, and on the CPU, whose tensors stand in for a GPU's."""

import re
from collections import deque
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from saev_dist.accumulators import fixed_point, moments, rows
from saev_dist.accumulators.base import Accumulator
from saev_dist.accumulators.moments import Moments
from saev_dist.accumulators.reconstruction import Reconstruction
from saev_dist.accumulators.topk import TopK as Slots
from saev_dist.cli import main
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.errors import DataError, MergeError
from saev_dist.estimate import estimate
from saev_dist.extract import run
from saev_dist.plan import Plan
from saev_dist.sae import encoder, pieces
from saev_dist.sae.encoder import Encoder, batch_threads
from saev_dist.sae.model import Gated, GroupMax, LayerNorm, Relu, Sae, Threshold, TopK
from saev_dist.world import World
from tests.laws import D_SAE, EXACT, KINDS, batches, fold, make_codes, on_device, same
from tests.ranks import artifact_hashes
from tests.synthetic import BATCH_TOPK, RELU, TOPK, make_acts, make_sae, make_shards, make_weights

DEVICES = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
every_device = pytest.mark.parametrize("device", DEVICES, ids=str)


@pytest.fixture(params=DEVICES, ids=str)
def device(request, monkeypatch):
    """Encoders on it leave codes there."""
    if request.param.type == "cpu":
        for module in (encoder, pieces):
            monkeypatch.setattr(module, "encodes_at_once", lambda device: True)
    return request.param


@every_device
@pytest.mark.parametrize("kind", KINDS)
@given(batches(values=EXACT), st.lists(st.sampled_from(["device", "fallback", "cpu", "read"]), min_size=6, max_size=6))
def test_a_state_does_not_depend_on_where_it_was_counted(device, kind, group, wheres):
    """Nor on when it is read."""
    acc, expected = KINDS[kind](), fold(KINDS[kind], group)
    for codes, where in zip(group, wheres, strict=False):
        if where == "cpu":
            acc.update(codes)
        elif where == "fallback":
            Accumulator.update_on_device(acc, on_device(codes, device))
        else:
            acc.update_on_device(on_device(codes, device))
        if where == "read":
            acc.state_dict()
    if device.type == "cuda" and isinstance(acc, Reconstruction):  # its products of floats are the device's own
        for (name, found), other in zip(acc.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(*map(fixed_point.to_float, (found, other)), rtol=1e-4, atol=1e-9, msg=name)
    else:
        assert same(acc, expected)


@every_device
@pytest.mark.parametrize("kind", KINDS)
@given(batches(values=EXACT))
def test_a_state_that_is_taken_over_replaces_what_a_device_counted(device, kind, group):
    acc = KINDS[kind]()
    for codes in group:
        acc.update_on_device(on_device(codes, device))
    acc.load_state_dict(KINDS[kind]().state_dict())
    assert same(acc, KINDS[kind]())


@every_device
def test_slots_that_were_full_keep_nothing_out_of_a_state_that_is_taken_over(device):
    acc, full, empty = (Slots(D_SAE, 2, 3, "patch") for _ in range(3))
    strong, weak = (on_device(make_codes(0, [[[value, 0.0, 0.0, 0.0, 0.0]] * 3]), device) for value in (2.0, 1.0))
    full.update_on_device(strong)
    acc.load_state_dict(full.state_dict())
    acc.update_on_device(weak)
    assert acc.state_dict()["values_sk"][0].tolist() == [2.0, 2.0]
    acc.load_state_dict(empty.state_dict())
    acc.update_on_device(weak)
    assert acc.state_dict()["values_sk"][0].tolist() == [1.0, 1.0]


@every_device
@given(batches())
def test_moments_of_a_device_round_each_score(device, group):
    acc = Moments(D_SAE)
    for codes in group:
        acc.update_on_device(on_device(codes, device))
    found = fixed_point.to_fractions(acc.state_dict()["sum_s2"])
    for s in range(D_SAE):
        above = [Fraction(v) for codes in group for v in codes.value_n[codes.feature_n == s].tolist() if v > 0]
        assert abs(found[s] - sum(above)) <= len(above) * Fraction(2) ** -63


@every_device
def test_moments_of_a_device_neither_wrap_nor_pass_the_limit(device, monkeypatch):
    def codes_of(value: float, n: int):
        dense = [[[value, 0.0, 0.0, 0.0, 0.0]] * 3] * n
        return on_device(make_codes(0, dense), device)

    for value, n, fine in ((2.0**60, 1, True), (2.0**60, 2, False), (2.0**63, 1, False), (3e38, 1, False)):
        acc = Moments(D_SAE)
        acc.update_on_device(codes_of(value, n))
        if fine:
            assert fixed_point.to_fractions(acc.state_dict()["sum_s2"])[0] == 3 * n * Fraction(value)
        else:
            with pytest.raises(MergeError, match=r"passes 4\.6e18"):
                acc.state_dict()
    monkeypatch.setattr(fixed_point, "MAX_ADDED", 4)
    acc, n_flushed = Moments(D_SAE), []
    flush = Moments.flush
    monkeypatch.setattr(moments.Moments, "flush", lambda self: (n_flushed.append(self._n_waiting), flush(self)))
    for _ in range(3):
        acc.update_on_device(codes_of(1.5, 1))
    assert n_flushed == [3, 3]
    assert fixed_point.to_fractions(acc.state_dict()["sum_s2"])[0] == 9 * Fraction(3, 2)


@every_device
@given(batches(), st.integers(1, 7), st.integers(1, 5))
def test_rows_are_those_of_the_cpu_to_the_bit(device, group, stride, n_features):
    for codes in group:
        moved = on_device(codes, device)
        for found, expected in zip(rows.image_means(moved, D_SAE), rows.image_means(codes, D_SAE), strict=True):
            assert found.dtype == expected.dtype and found.device.type == device.type
            np.testing.assert_array_equal(found.cpu(), expected)
        found = rows.sampled_values(moved, n_features, stride)
        np.testing.assert_array_equal(found.cpu(), rows.sampled_values(codes, n_features, stride))


@every_device
@given(batches(), st.integers(1, 3))
def test_codes_are_split_between_images(device, group, n_imgs):
    for codes in group:
        moved = on_device(codes, device)
        parts = list(moved.split(n_imgs))
        firsts = [part.img_i - codes.img_i for part in parts]
        assert firsts == list(range(0, codes.n_imgs, n_imgs))
        assert [part.n_imgs for part in parts] == [min(n_imgs, codes.n_imgs - first) for first in firsts]
        found_n = torch.cat([part.token_n + first * 3 for part, first in zip(parts, firsts, strict=True)])
        assert torch.equal(found_n, moved.token_n)
        assert all(part.token_n.ge(0).all() and part.token_n.lt(part.n_tokens).all() for part in parts)
        for name in ("feature_n", "value_n", "acts_bd", "x_bd"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(moved, name))


@every_device
@pytest.mark.parametrize("rank_by", ["patch", "image"])
@given(batches(), st.integers(1, 4))
def test_slots_of_a_device_are_those_of_the_cpu(device, rank_by, group, top_k):
    """Also while candidates wait: they are merged when they are half as many as the slots."""
    acc, expected = (Slots(D_SAE, top_k, 3, rank_by) for _ in range(2))
    for codes in group:
        acc.update_on_device(on_device(codes, device))
        expected.update(codes)
    assert same(acc, expected)


KINDS_OF_SAE = [
    Relu(), TopK(4), TopK(4, relu=True), TopK(99), GroupMax(4), Threshold(0.5), Threshold(torch.arange(24) / 8),
    Gated(torch.arange(1, 25) / 32, torch.arange(24) * 0.25 - 2),
]  # fmt: skip


@pytest.mark.parametrize("lane_codes", [1, 500, 10**6])
@pytest.mark.parametrize("norm", [None, LayerNorm()], ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_SAE, ids=lambda kind: f"{kind.name}-{getattr(kind, 'k', '')}")
def test_codes_are_those_of_the_cpu(monkeypatch, device, kind, norm, lane_codes):
    sae = Sae(**make_weights(), activation=kind, pre_bias=True, input_norm=norm, source="integers")
    acts_bd = torch.from_numpy(make_acts(11)).view(-1, sae.d_model)
    with monkeypatch.context() as patch:
        for module in (encoder, pieces):
            patch.setattr(module, "encodes_at_once", lambda device: False)
        with Encoder(sae, torch.device("cpu"), "fp32", 1) as plain:
            expected = plain.encode(acts_bd, img_i=3, n_patches=5)
            lifted = [plain.encode_lifted(acts_bd[:1], s, 0.5) for s in range(sae.d_sae)]
    monkeypatch.setattr(pieces, "LANE_CODES", lane_codes)
    assert pieces.batches_ahead({11: 9}, 5, kind, sae.d_sae, device, batch_threads(device)) == 2
    with Encoder(sae, device, "fp32", 2) as lanes, lanes.beside():
        waits = [lanes.submit_batch(acts_bd, img_i=3, n_patches=5)[0] for _ in range(4)]
        many = [codes.result() for codes in waits]
        one = lanes.encode(acts_bd, img_i=3, n_patches=5)
        for codes in (*(codes.cpu() for codes in many), one):
            assert (codes.img_i, codes.n_imgs, codes.n_patches) == (3, 11, 5)
            if norm is None:
                assert torch.equal(codes.token_n, expected.token_n)
                assert torch.equal(codes.feature_n, expected.feature_n)
                assert torch.equal(codes.value_n, expected.value_n)
            else:
                dense_bs, expected_bs = torch.zeros(55, sae.d_sae), torch.zeros(55, sae.d_sae)
                dense_bs[codes.token_n, codes.feature_n] = codes.value_n
                expected_bs[expected.token_n, expected.feature_n] = expected.value_n
                torch.testing.assert_close(dense_bs, expected_bs)
        only = torch.tensor([1, 3, 8], device=device)
        found = lanes.submit(acts_bd, img_i=3, n_patches=5, only=only).result()
        wanted_n = torch.isin(one.feature_n, only.cpu())
        assert torch.equal(found.feature_n, one.feature_n[wanted_n])
        assert torch.equal(found.value_n, one.value_n[wanted_n])
        if norm is None:
            found = [lanes.encode_lifted(acts_bd[:1], s, 0.5) for s in range(sae.d_sae)]
            assert found == pytest.approx(lifted) and any(found)
        for codes in many:
            assert codes.value_n.device.type == device.type
            assert (codes.token_n * sae.d_sae + codes.feature_n).diff().gt(0).all(), "by token, then by feature"


@pytest.mark.parametrize(
    "threshold", [1.499, 1.5, torch.full((24,), 1.499), torch.linspace(0, 3, 24)], ids=["between", "at", "all", "each"]
)
def test_bf16_has_the_same_codes_on_both(monkeypatch, device, threshold):
    """A threshold between two of its numbers is not rounded up to one that scores have."""
    sae = Sae(**make_weights(), activation=Threshold(threshold), pre_bias=False, source="halves")
    acts_bd = torch.from_numpy(make_acts(11)).view(-1, sae.d_model) / 2
    bars = torch.as_tensor(threshold).expand(24)
    h_bs = acts_bd @ sae.w_enc_ds + sae.b_enc_s
    expected_bs = h_bs * (h_bs > bars)
    assert ((h_bs == 1.5) & (expected_bs > 0)).any() == bool((bars < 1.5).any())
    for at_once in (True, False) if device.type == "cpu" else (True,):
        for module in (encoder, pieces):
            monkeypatch.setattr(module, "encodes_at_once", lambda device, at_once=at_once: at_once)
        with Encoder(sae, device, "bf16", 1) as one:
            codes = one.encode(acts_bd, img_i=0, n_patches=5)
        dense_bs = torch.zeros_like(h_bs)
        dense_bs[codes.token_n, codes.feature_n] = codes.value_n
        assert torch.equal(dense_bs, expected_bs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_lanes_wait_for_what_is_slow(monkeypatch):
    """Every product and every sum takes 20 ms longer: whoever does not wait reads what is not there yet, or no longer."""
    device, sae = torch.device("cuda"), Sae(**make_weights(), activation=TopK(4), pre_bias=False, source="integers")
    select = Encoder._select_at_once
    monkeypatch.setattr(Encoder, "_select_at_once", lambda *args: (torch.cuda._sleep(40_000_000), select(*args))[1])
    batches_bd = [torch.from_numpy(make_acts(11, seed=i)).view(-1, sae.d_model).pin_memory() for i in range(50)]
    acc = Moments(sae.d_sae)
    under_way = deque()
    with Encoder(sae, device, "fp32", 2) as lanes, lanes.beside():
        for acts_bd in [*batches_bd, None, None]:
            if acts_bd is not None:
                under_way.append((acts_bd, lanes.submit_batch(acts_bd, img_i=0, n_patches=5)[0]))
            if len(under_way) > 2 or acts_bd is None:
                former_bd, wait = under_way.popleft()
                codes = wait.result()
                former_bd.fill_(1000)
                torch.cuda._sleep(40_000_000)
                acc.add(codes)
                lanes.wait()
                del codes, wait  # and a lane takes their memory
    expected = Moments(sae.d_sae)
    with Encoder(sae, torch.device("cpu"), "fp32", 1) as plain:
        for i in range(50):
            expected.update(plain.encode(torch.from_numpy(make_acts(11, seed=i)).view(-1, sae.d_model), img_i=0, n_patches=5))
    assert same(acc, expected)


@pytest.mark.parametrize("activation", [RELU, TOPK, BATCH_TOPK], ids=lambda activation: activation["cls"])
@pytest.mark.parametrize("rank_by", ["patch", "image"])
def test_a_run_of_integers_is_the_one_of_the_cpu(tmp_path, monkeypatch, device, activation, rank_by):
    monkeypatch.setattr(rows, "GROUPS_ON_DEVICE", 50)  # two images
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt", activation)

    def extract(out, where):
        cfg = Extract(
            shards=shards, sae=sae, out=tmp_path / out, top_k=8, rank_by=rank_by, batch_tokens=11, n_distributions=7,
            max_distribution_samples=50, metrics=True, snapshot_every=0, device=where, progress=False,
        )  # fmt: skip
        run(cfg)
        return artifact_hashes(tmp_path / out)

    with monkeypatch.context() as patch:
        for module in (encoder, pieces):
            patch.setattr(module, "encodes_at_once", lambda device: device.type != "cpu")
        expected = extract("cpu", "cpu")
    assert extract("device", device.type) == expected
    main(["verify", "--run", str(tmp_path / "device"), "--all", "--no-progress", "--device", device.type])


def test_what_a_gpu_has_no_memory_for_is_refused_before_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(World, "device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt", RELU)
    args = ["extract", "--shards", str(shards), "--sae", str(sae), "--out", str(tmp_path / "run"), "--dry-run"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    main(args)
    assert re.search(
        r"device +weights .*, batches .*, dense codes .*, codes .*, statistics .*, allocator .*, libraries ",
        capsys.readouterr().out,
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 1
    assert "of device memory; 1.0 kB are free on cuda. Lower --batch-tokens." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_bad_value_is_named_with_its_place(tmp_path, device):
    acts = make_acts()
    acts[17, 3, 2] = np.nan
    shards, sae = make_shards(tmp_path / "shards", acts), make_sae(tmp_path / "sae.pt")
    with pytest.raises(DataError, match=r"image 17 .*patch 3, dimension 2 is nan"):
        run(
            Extract(
                shards=shards, sae=sae, out=tmp_path / "run", batch_tokens=11, self_check="off", device=device.type,
                progress=False,
            )
        )  # fmt: skip


def test_page_locked_buffers_are_counted_as_torch_takes_them(tmp_path):
    """Up to a power of two."""
    shards = Shards.open(make_shards(tmp_path, make_acts()))
    sae = Sae(**make_weights(), activation=Relu(), pre_bias=False, source="")
    cfg, plan = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path), Plan(shards.examples, 7)
    n_bytes = estimate(cfg, shards, sae, plan, torch.device("cuda", 0), 2).host["read buffers"]
    one = 7 * shards.content_bytes
    assert one < 1024 and n_bytes % 1024 == 0 and n_bytes >= 1024
