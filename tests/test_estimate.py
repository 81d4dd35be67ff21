"""What a run is said to need before it starts, and what is refused."""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saev_dist import estimate
from saev_dist.cli import main
from saev_dist.config import Extract
from saev_dist.data.shards import Shards
from saev_dist.errors import ConfigError
from saev_dist.output import gb
from saev_dist.plan import Plan
from saev_dist.sae.model import ConstantNorm, GroupMax, Relu, Sae, TopK
from tests.synthetic import D_MODEL, D_SAE, N_IMGS, N_PATCHES, make_acts, make_sae, make_shards, make_weights

CPU = torch.device("cpu")


def make_job(tmp_path, n_imgs=N_IMGS, n_threads=1, device=CPU, activation=None, norm=None, **settings):
    """What `estimate` looks at of a job whose batches are one image."""
    shards = Shards.open(make_shards(tmp_path / f"shards{time.monotonic_ns()}", make_acts(n_imgs)))
    sae = Sae(**make_weights(), activation=activation or Relu(), pre_bias=False, input_norm=norm, source="")
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path, **settings)
    return SimpleNamespace(cfg=cfg, shards=shards, sae=sae, plan=Plan(shards.examples, 1), device=device, n_threads=n_threads)


def stated(tmp_path, **of_job):
    job = make_job(tmp_path, **of_job)
    return estimate.estimate(job.cfg, job.shards, job.sae, job.plan, job.device, job.n_threads)


def test_no_more_is_stated_than_a_small_run_can_use(tmp_path):
    """Threads without pieces and buffers without batches take no memory."""
    few, many = (stated(tmp_path, n_imgs=3, n_threads=n) for n in (3, 64))
    assert few == many
    assert few.n_threads == 3
    assert few.host["read buffers"] == 3 * 4 * N_PATCHES * D_MODEL


def test_img_acts_of_very_many_entries_has_wide_indices(tmp_path):
    """From 2^31 of them on SciPy's indices take 8 bytes each."""
    sae = Sae(**make_weights(), activation=TopK(1), pre_bias=False, source="")
    cfg = Extract(shards=tmp_path, sae=tmp_path, out=tmp_path)
    of_three, of_many = Shards.open(make_shards(tmp_path / "shards", make_acts(3))), 2**31 // N_PATCHES + 1
    shards = [replace(of_three, examples=(n,)) for n in (of_many - 1, of_many)]
    small, large = (estimate.estimate(cfg, each, sae, Plan(each.examples, 1), CPU, 1).img_acts for each in shards)
    assert small == (of_many - 1) * (8 * N_PATCHES + 8)
    assert large == of_many * (12 * N_PATCHES + 8)


def test_the_plan_tells_what_img_acts_can_take(tmp_path, capsys):
    shards, sae = (
        make_shards(tmp_path / "shards", make_acts()),
        make_sae(tmp_path / "sae.pt", {"cls": "TopK", "params": {"top_k": 2}}),
    )
    args = ["extract", "--shards", str(shards), "--sae", str(sae), "--dry-run", "--out", str(tmp_path / "run")]
    main(args)
    d_sae = make_weights()["w_enc_ds"].shape[1]
    most = gb(N_IMGS * (8 * min(d_sae, 2 * N_PATCHES) + 8))
    assert f", and img_acts.npz up to about {most}, twice that while it is put together; " in capsys.readouterr().out
    main([*args, "--no-img-acts"])
    assert "img_acts" not in capsys.readouterr().out


def planned(tmp_path, monkeypatch) -> tuple[list[str], estimate.Estimate]:
    """A dry run's command, beside partials to be, and what it said that the run needs."""
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    args = ["extract", "--shards", str(shards), "--sae", str(sae), "--dry-run", "--out", str(tmp_path / "run")]
    estimated, asked = estimate.estimate, []
    monkeypatch.setattr(estimate, "estimate", lambda *args: asked.append(estimated(*args)) or asked[-1])
    main(args)
    need = asked[0]
    (tmp_path / "run/partials").mkdir(parents=True)
    return args, need


def test_partials_that_will_go_are_no_want_of_disk(tmp_path, monkeypatch):
    """A first snapshot needs room beside them, the second replaces it when they are gone."""
    args, need = planned(tmp_path, monkeypatch)
    for held, free, fits in ((0, 2, True), (0, 1.9, False), (0.5, 1.5, True), (0.5, 1.4, False), (3, 1, True), (3, 0.9, False)):
        (tmp_path / "run/partials/00000-a.000000.partial").write_bytes(bytes(int(held * need.partial)))
        monkeypatch.setattr(estimate, "free_disk", lambda dpath, free=free: need.artifacts + free * need.partial + 1)
        with nullcontext() if fits else pytest.raises(SystemExit, match=r"^1$"):
            main(args)


def test_a_disk_that_the_image_means_may_fill_is_warned_of(tmp_path, monkeypatch, capsys):
    args, need = planned(tmp_path, monkeypatch)
    for spilled, free, flags, is_warned in (
        (0, 2, [], False),
        (0, 1.9, [], True),
        (0, 0, ["--no-img-acts"], False),
        (0.5, 1.5, [], False),
        (0.5, 1.4, [], True),
    ):
        spill_fpath, staged_fpath = (tmp_path / "run/partials" / n for n in ("img_acts_data.00000-a.bin", "img_acts.npz"))
        spill_fpath.write_bytes(bytes(int(spilled * need.img_acts)))
        staged_fpath.unlink(missing_ok=True)
        os.link(spill_fpath, staged_fpath)  # one file by two names, of a run killed as it made its artifacts
        room = need.artifacts + need.partial * 2 + int(free * need.img_acts) + 1
        monkeypatch.setattr(estimate, "free_disk", lambda dpath, room=room: room)
        capsys.readouterr()
        main([*args, *flags])
        err = capsys.readouterr().err
        most = gb(need.img_acts)
        said = f"warning: img_acts.npz may take about {most}, twice that while it is put together; "
        assert (said in err) == is_warned and ("--no-img-acts leaves it out." in err) == is_warned, err


def test_groups_bound_the_codes_as_k_does(tmp_path):
    of_groups, of_top_k = (stated(tmp_path, activation=kind).img_acts for kind in (GroupMax(4), TopK(4)))
    assert of_groups == of_top_k


def test_features_that_do_not_exist_have_no_distributions(tmp_path):
    whole, more, two = (stated(tmp_path, n_distributions=n) for n in (D_SAE, 10**6, 2))
    assert whole == more
    assert whole.host["distributions, when written"] > two.host["distributions, when written"] > 0


def test_memory_does_not_grow_with_the_images(tmp_path):
    few, many = (stated(tmp_path, n_imgs=n).host for n in (40, 400))
    few.pop("distributions, when written"), many.pop("distributions, when written")
    assert few == many


def test_copies_of_weights_tokens_and_codes_are_stated(tmp_path):
    assert stated(tmp_path, screen="bf16").host["weights to screen by"] == 6 * D_MODEL * D_SAE
    assert stated(tmp_path, norm=ConstantNorm()).host["dense codes"] > stated(tmp_path).host["dense codes"]
    gpu = torch.device("cuda", 0)
    assert "codes" not in stated(tmp_path, device=gpu).host
    assert stated(tmp_path, device=gpu, percentile_estimator="saev").host["codes"] > 0


def test_artifacts_hold_twenty_bytes_a_slot_and_the_samples(tmp_path):
    small, large, wide = (stated(tmp_path, top_k=k, n_distributions=n).artifacts for k, n in ((10, 0), (20, 0), (10, D_SAE)))
    assert (large - small, wide - small) == (20 * D_SAE * 10, 4 * D_SAE * N_IMGS * N_PATCHES)


def fitted(tmp_path, monkeypatch, available, n_threads=1, **world):
    """What `fit` says to a rank of two on one machine that has so many times what (at most) ten threads need; and that."""
    job = make_job(tmp_path, n_imgs=40, n_threads=n_threads)
    need = estimate.estimate(job.cfg, job.shards, job.sae, job.plan, job.device, min(10, n_threads))
    monkeypatch.setattr(estimate, "available_memory", lambda: available * need.host_total)
    place = SimpleNamespace(**{"local_size": 2, "local_rank": 1, "rank": 1, "size": 2} | world)
    return estimate.fit(job, place), need


def test_ranks_of_one_machine_share_its_memory(tmp_path, monkeypatch, capsys):
    assert fitted(tmp_path, monkeypatch, 2, 30)[0].n_threads == 10
    assert capsys.readouterr().err == "", "one of them says so"
    fitted(tmp_path, monkeypatch, 2, 30, local_rank=0)
    assert "10 of 30 threads encode" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="of host memory for each of 2 ranks here; "):
        fitted(tmp_path, monkeypatch, 1.5)


def test_each_rank_has_a_partial_on_the_disk(tmp_path, monkeypatch):
    _, need = fitted(tmp_path, monkeypatch, 2)
    for room, fits in ((4, True), (3.9, False)):
        monkeypatch.setattr(estimate, "free_disk", lambda dpath, room=room: need.artifacts + room * need.partial)
        with nullcontext() if fits else pytest.raises(ConfigError, match="of disk, and snapshots"):
            fitted(tmp_path, monkeypatch, 2, rank=0)


def test_a_damaged_partial_is_not_what_a_full_disk_tells_of(tmp_path, monkeypatch):
    (tmp_path / "partials").mkdir()
    (tmp_path / "partials/00000-a.000000.partial").write_bytes(b"no partial")
    monkeypatch.setattr(estimate, "free_disk", lambda dpath: 0)
    with pytest.raises(ConfigError, match="of disk, and snapshots"):
        fitted(tmp_path, monkeypatch, 2, rank=0)
