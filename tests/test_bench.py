"""Benchmarks that put something in the place of a part of the program, and break when that part changes."""

from saev_dist import extract
from saev_dist.config import Extract
from saev_dist.plan import complement, union
from tests.bench import start
from tests.synthetic import make_acts, make_sae, make_shards


def test_a_rank_whose_peers_are_not_there_comes_to_its_stream(tmp_path, monkeypatch):
    for name in ("World", "_stream"):  # which `start.start` replaces: as they are now they come back
        monkeypatch.setattr(extract, name, getattr(extract, name))
    monkeypatch.setattr(start, "MANY", 4)
    monkeypatch.setattr(start, "forget_peak", lambda: None)
    shards, sae = make_shards(tmp_path / "shards", make_acts()), make_sae(tmp_path / "sae.pt")
    cfg = Extract(shards=shards, sae=sae, out=tmp_path / "run", batch_tokens=5, top_k=4, device="cpu", self_check="off")
    afresh = [start.start(rank, cfg, tmp_path)["todo"] for rank in range(4)]
    assert len(union(afresh)) == 1 and all(afresh)
    left = start.write_partials(cfg)
    resumed = [start.start(rank, cfg, tmp_path) for rank in range(4)]
    assert union(row["todo"] for row in resumed) == left != complement((), 23)
    assert [row["n_absorbed"] for row in resumed] == [1, 1, 1, 1]
