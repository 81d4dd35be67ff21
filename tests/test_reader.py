"""The reader delivers every batch, in order and unharmed while it is held, from small shards and big ones."""

import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from saev_dist.data import reader
from saev_dist.data.reader import Reader, buffer_examples, most_buffers
from saev_dist.data.shards import Shards, ShardWriter
from saev_dist.errors import ConfigError, DataError, Preempted
from saev_dist.plan import Plan

N_IMGS, N_PATCHES, D_MODEL = 61, 3, 4


def write(dpath: Path, examples_per_shard: int) -> Shards:
    acts_eltd = np.arange(N_IMGS * N_PATCHES * D_MODEL, dtype=np.float32).reshape(N_IMGS, 1, N_PATCHES, D_MODEL)
    with ShardWriter(
        dpath, family="t", ckpt="t", layers=[0], content_tokens_per_example=N_PATCHES, d_model=D_MODEL, cls_token=False,
        max_tokens_per_shard=examples_per_shard * N_PATCHES,
    ) as writer:  # fmt: skip
        writer.write(acts_eltd)
    return Shards.open(dpath)


@pytest.mark.parametrize("examples_per_shard", [1, 3, 20])
@pytest.mark.parametrize("bad", [(), (0, 1, 2), tuple(range(12)), (2,)])
@pytest.mark.parametrize(("batch", "n_parts", "hold"), [(1, 1, 2), (2, 1, 0), (2, 3, 2), (7, 1, 0), (7, 3, 5), (100, 5, 2)])
def test_batches_come_in_order_and_stay_while_held(tmp_path, monkeypatch, examples_per_shard, bad, batch, n_parts, hold):
    n_buffers, empty = [], torch.empty
    monkeypatch.setattr(reader.torch, "empty", lambda *args, **kwargs: n_buffers.append(args[0]) or empty(*args, **kwargs))
    monkeypatch.setattr(reader, "MIN_PART_BYTES", 1)
    shards = write(tmp_path, examples_per_shard)
    bad = [shard_i for shard_i in bad if shard_i < len(shards.names)]
    for shard_i in bad:
        fpath = tmp_path / shards.names[shard_i]
        if shard_i % 2:
            os.truncate(fpath, fpath.stat().st_size // 2)
        else:
            fpath.unlink()
    plan = Plan(shards.examples, batch)
    todo = ((0, 2), (3, plan.n_batches))
    wanted = [plan[index] for first, stop in todo for index in range(first, stop)]
    # Of a shard that is too short, what comes before its end is good.
    good = [
        batch.index for batch in wanted
        if batch.shard_i not in bad
        or (batch.shard_i % 2 and batch.example_i + batch.n_examples <= shards.examples[batch.shard_i] // 2)
    ]  # fmt: skip
    seen = []
    stream = Reader(shards, plan, todo, depth=3, hold=hold, n_parts=n_parts, skip_bad=True)
    for batch, acts_bd in stream:
        seen.append((batch, acts_bd))
        for earlier, held_bd in seen[-1 - hold :]:
            first = earlier.img_i * N_PATCHES * D_MODEL
            assert torch.equal(held_bd.flatten(), torch.arange(first, first + held_bd.numel(), dtype=torch.float32))
            assert len(held_bd) == earlier.n_examples * N_PATCHES
    assert [batch.index for batch, _ in seen] == good
    assert sorted(stream.left_out) == [batch.index for batch in wanted if batch.index not in good]
    assert stream.n_left_out == sum(batch.n_examples for batch in wanted if batch.index not in good)
    assert stream.n_bytes == sum(batch.n_examples for batch, _ in seen) * shards.content_bytes
    assert set(n_buffers) == {buffer_examples(plan, shards) * N_PATCHES * D_MODEL}, "the memory that is stated"
    assert len(n_buffers) <= (3 + hold + 1 if bad else most_buffers(plan, shards, 3, hold))


@pytest.mark.parametrize("batch", [1, 4, 20])
@pytest.mark.parametrize("n_parts", [1, 3])
def test_all_before_a_bad_shard_is_delivered_then_the_error(tmp_path, monkeypatch, batch, n_parts):
    monkeypatch.setattr(reader, "MIN_PART_BYTES", 1)
    shards = write(tmp_path, 1)
    (tmp_path / shards.names[5]).unlink()
    (tmp_path / shards.names[7]).unlink()
    stream = iter(Reader(shards, Plan(shards.examples, batch), ((0, N_IMGS),), depth=2, n_parts=n_parts))
    assert [next(stream)[0].index for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=shards.names[5]):
        next(stream)


def test_who_waits_for_a_read_can_be_called_away(tmp_path, monkeypatch):
    n_read = 0

    def read(*args, **kwargs):
        nonlocal n_read
        n_read += 1
        time.sleep(1)

    def leave():
        raise Preempted("leave")

    monkeypatch.setattr(reader, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(reader, "read_batch", read)
    shards = write(tmp_path, 1)
    with pytest.raises(Preempted):
        list(Reader(shards, Plan(shards.examples, 20), ((0, N_IMGS),), depth=1, check=leave))
    assert n_read < 10, "of a load of 20"


def test_small_shards_are_read_into_one_buffer(tmp_path):
    """One handing over, and not one a shard: `tests.bench.read` has what it saves."""
    shards = write(tmp_path, 1)
    stream = Reader(shards, Plan(shards.examples, 20), ((0, N_IMGS),), depth=1)
    places = [(acts_bd.untyped_storage().data_ptr(), acts_bd.storage_offset()) for _, acts_bd in stream]
    assert len({buffer for buffer, _ in places}) <= most_buffers(stream.plan, shards, 1, 1) < N_IMGS / 10
    assert [at for _, at in places] == [index % 20 * N_PATCHES * D_MODEL for index in range(N_IMGS)]


def test_large_batches_of_smaller_shards_take_no_more_memory_than_they_need(tmp_path, monkeypatch):
    shards = write(tmp_path, 20)
    monkeypatch.setattr(reader, "LOAD_BYTES", 10 * shards.content_bytes)
    plan = Plan(shards.examples, 10**9)
    assert buffer_examples(plan, shards) == 20
    assert [len(acts_bd) // N_PATCHES for _, acts_bd in Reader(shards, plan, ((0, 4),), depth=1)] == [20, 20, 20, 1]
    assert most_buffers(plan, shards, 3, 2) == 4
    monkeypatch.setattr(reader, "LOAD_BYTES", 30 * shards.content_bytes)
    assert buffer_examples(plan, shards) == 30
    assert buffer_examples(Plan(shards.examples, 7), shards) == 7
    monkeypatch.setattr(reader, "LOAD_BYTES", 10**9)
    assert buffer_examples(plan, shards) == N_IMGS
    assert most_buffers(plan, shards, 3, 2) == 1


@pytest.mark.parametrize("skip_bad", [False, True])
def test_of_a_batch_in_several_parts_the_first_that_fails_is_named(tmp_path, monkeypatch, skip_bad):
    monkeypatch.setattr(reader, "MIN_PART_BYTES", 1)
    shards = write(tmp_path, 20)
    end = 10 * shards.content_bytes + 4  # amid the second of three parts
    os.truncate(tmp_path / shards.names[0], end)
    source = Reader(shards, Plan(shards.examples, 20), ((0, 2),), depth=1, n_parts=3, skip_bad=skip_bad)
    if skip_bad:
        assert len(list(source)) == 1
        assert f"ends at byte {end};" in source.left_out[0]
    else:
        with pytest.raises(DataError, match=f"ends at byte {end};"):
            list(source)


def test_of_a_shard_that_fails_only_the_first_read_is_repeated(tmp_path, monkeypatch):
    asked = []

    def read(shards, batch, buffer, *, patient):
        asked.append((batch.img_i, patient))
        if batch.shard_i == 1:
            raise DataError("bad")

    monkeypatch.setattr(reader, "read_batch", read)
    shards = write(tmp_path, 20)
    list(Reader(shards, Plan(shards.examples, 8), ((0, 10),), depth=1, skip_bad=True))
    assert asked == [(0, True), (8, True), (16, True), (20, True), (28, False), (36, False), (40, True), (48, True), (56, True), (60, True)]  # fmt: skip


def test_who_leaves_waits_for_no_more_than_the_files_that_are_being_read(tmp_path, monkeypatch):
    n_read, read_batch = 0, reader.read_batch

    def read(*args, **kwargs):
        nonlocal n_read
        n_read += 1
        time.sleep(0 if n_read <= 20 else 1)
        read_batch(*args, **kwargs)

    monkeypatch.setattr(reader, "read_batch", read)
    shards = write(tmp_path, 1)
    stream = iter(Reader(shards, Plan(shards.examples, 20), ((0, N_IMGS),), depth=1))
    next(stream)
    stream.close()
    assert n_read < 40, "of two loads of 20"


@pytest.mark.parametrize("n_images", [1, 4])
def test_it_says_whether_the_next_batch_is_there(tmp_path, monkeypatch, n_images):
    """Batches of one image, read one by one and by four; the last of each four cannot be read."""
    go_on, read_batch = threading.Event(), reader.read_batch
    n_good = max(1, n_images - 1)

    def read(shards, batch, buffer, *, patient):
        if batch.img_i == n_images:
            go_on.wait(30)
        if batch.img_i % n_images == n_good:
            raise DataError("bad")
        read_batch(shards, batch, buffer, patient=patient)

    monkeypatch.setattr(reader, "read_batch", read)
    shards = write(tmp_path, 1)
    source = Reader(shards, Plan(shards.examples, n_images), ((0, 2 * n_images),), depth=1, skip_bad=True)
    stream = iter(source)
    for place in range(n_good):
        next(stream)
        assert source.is_ready == (place < n_good - 1)
    go_on.set()
    assert len(list(stream)) == n_good
    assert source.is_ready, "there is none left to wait for"


def test_stopping_early_leaves_no_thread(tmp_path):
    shards = write(tmp_path, 3)
    source = Reader(shards, Plan(shards.examples, 2), ((0, 10),), depth=3)
    stream = iter(source)
    next(stream)
    assert any(thread.name.startswith("reader") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())
    assert len(list(source)) == 10, "it can begin anew"


def test_of_several_layers_only_the_wanted_one_is_read(tmp_path):
    """Gaps beyond `MAX_GAP_BYTES` are passed over: counted by the kernel."""
    n_imgs, n_layers, d_model = 8, 5, 8_192
    acts_eltd = np.random.default_rng(0).standard_normal((n_imgs, n_layers, N_PATCHES, d_model), np.float32)
    with ShardWriter(
        tmp_path, family="t", ckpt="t", layers=range(n_layers), content_tokens_per_example=N_PATCHES, d_model=d_model,
        cls_token=False, max_tokens_per_shard=4 * n_layers * N_PATCHES,
    ) as writer:  # fmt: skip
        writer.write(acts_eltd)
    shards = Shards.open(tmp_path, 3)
    before = asked_bytes()
    acts_btd = [acts_bd.clone() for _, acts_bd in Reader(shards, Plan(shards.examples, 2), ((0, 4),), depth=2)]
    asked = asked_bytes() - before
    assert np.array_equal(torch.cat(acts_btd).numpy().reshape(n_imgs, N_PATCHES, d_model), acts_eltd[:, 3])
    wanted = n_imgs * shards.content_bytes
    assert wanted <= asked < 1.1 * wanted


def asked_bytes() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize(
    "how", [np.asfortranarray, lambda a: a.astype(">f4"), lambda a: np.repeat(a, 2, axis=3)[..., ::2], torch.from_numpy]
)
def test_arrays_of_any_layout_are_written_as_the_format_has_them(tmp_path, how):
    acts_eltd = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)
    with ShardWriter(
        tmp_path / "s", family="test", ckpt="noise", layers=[0, 1], content_tokens_per_example=3, d_model=4, cls_token=False,
        max_tokens_per_shard=2 * 2 * 3,
    ) as writer:  # fmt: skip
        writer.write(how(acts_eltd))
    written = b"".join(fpath.read_bytes() for fpath in sorted((tmp_path / "s").glob("*.bin")))
    assert written == acts_eltd.astype("<f4").tobytes()


def test_activations_of_another_shape_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    writer = ShardWriter(
        tmp_path / "s", family="t", ckpt="t", layers=[0], content_tokens_per_example=3, d_model=4, cls_token=True,
        max_tokens_per_shard=100,
    )  # fmt: skip
    for shape in ((5, 1, 3, 4), (5, 4, 4), (5, 2, 4, 4)):
        with pytest.raises(DataError, match=re.escape(f"{shape}; expected (examples, 1 layers, 4 tokens, d_model 4)")), writer:
            writer.write(np.zeros(shape, np.float32))
    assert not list((tmp_path / "s").iterdir())


SMALL = {"family": "t", "ckpt": "t", "content_tokens_per_example": 3, "cls_token": False, "max_tokens_per_shard": 6}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": []}, "layers is [];"),
        ({"layers": [1, 1]}, "layers is [1, 1]; expected one number or more, all different."),
        ({"layers": ["a"]}, "a layer is 'a'; expected a whole number"),
        ({"d_model": 0}, "d_model is 0; expected a whole number of at least 1."),
        ({"d_model": True}, "d_model is True;"),
        ({"max_tokens_per_shard": 1e6}, "max_tokens_per_shard is 1000000.0;"),
        ({"max_tokens_per_shard": 2}, "max_tokens_per_shard is 2; one example takes 3."),
        ({"content_tokens_per_example": 0}, "content_tokens_per_example is 0;"),
        ({"data": {"root": Path("x")}}, "data is no plain JSON"),
    ],
)
def test_what_no_reader_would_take_is_refused_before_anything_is_written(tmp_path, changed, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ShardWriter(tmp_path / "s", **(SMALL | {"layers": [0], "d_model": 4} | changed))


def test_numbers_of_numpy_and_tensors_of_any_kind_are_written(tmp_path):
    acts_eltd = torch.arange(48.0).reshape(4, 1, 3, 4)
    how = SMALL | {"layers": np.array([11]), "d_model": np.int64(4), "cls_token": np.False_, "dataset": None}
    with ShardWriter(tmp_path / "s", **how) as writer:
        writer.write(acts_eltd[:1].bfloat16())
        writer.write(acts_eltd[1:2].requires_grad_())
        writer.write(acts_eltd[2:].detach().long())
    shards = Shards.open(tmp_path / "s")
    assert (shards.layer, shards.d_model, shards.dataset, list(shards.examples)) == (11, 4, None, [2, 2])
    assert b"".join((tmp_path / "s" / name).read_bytes() for name in shards.names) == acts_eltd.detach().numpy().tobytes()


def test_a_write_that_failed_in_part_is_not_gone_on_with(tmp_path, monkeypatch):
    images = np.zeros((3, 1, 3, 4), np.float32)
    writer = ShardWriter(tmp_path, layers=[0], d_model=4, **SMALL).__enter__()
    writer.write(images)
    with monkeypatch.context() as full:
        full.setattr(writer, "_file", None)
        full.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            writer.write(images)
    for go_on in (lambda: writer.write(images), lambda: writer.__exit__(None, None, None)):
        with pytest.raises(DataError, match="a write failed before"):
            go_on()
    assert not (tmp_path / "metadata.json").exists()


def test_a_writer_writes_only_while_it_is_open_and_not_nothing(tmp_path):
    how = SMALL | {"layers": [0], "d_model": 4}
    with ShardWriter(tmp_path / "s", **how) as writer:
        writer.write(np.zeros((2, 1, 3, 4)))
    with pytest.raises(DataError, match="the writer is not open"):
        writer.write(np.zeros((2, 1, 3, 4)))
    assert len(list((tmp_path / "s").glob("*.bin"))) == 1
    with pytest.raises(DataError, match="no examples were written"), ShardWriter(tmp_path / "t", **how):
        pass
    with pytest.raises(DataError, match="are of the type complex128"), ShardWriter(tmp_path / "u", **how) as writer:
        writer.write(np.zeros((2, 1, 3, 4), complex))


def test_a_buffer_is_used_again_only_when_no_part_is_read_into_it_any_more(tmp_path, monkeypatch):
    """The first part of a batch fails at once, the other one is slow."""
    shards = write(tmp_path, 20)
    read_batch = reader.read_batch

    def read(shards, batch, buffer, *, patient):
        if batch.img_i == 0:
            raise DataError("bad")
        if batch.img_i == 2:
            time.sleep(0.2)
        read_batch(shards, batch, buffer, patient=patient)

    monkeypatch.setattr(reader, "MIN_PART_BYTES", 1)
    monkeypatch.setattr(reader, "read_batch", read)
    stream = Reader(shards, Plan(shards.examples, 4), ((0, 4),), depth=1, hold=0, n_parts=2, skip_bad=True)
    for batch, acts_bd in stream:
        time.sleep(0.3)
        first = batch.img_i * N_PATCHES * D_MODEL
        assert torch.equal(acts_bd.flatten(), torch.arange(first, first + acts_bd.numel(), dtype=torch.float32))
    assert list(stream.left_out) == [0]
