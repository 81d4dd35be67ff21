"""Which features and slots a replay takes, and how ranks share them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev_dist.choose import SLOT, FeatureTable, choose_features, choose_slots, deal
from saev_dist.errors import ConfigError

FREQ = np.log10(np.array([0.5, 1e-7, 0.01, 1e-3, 1e-3, 1.0]) + 0.0)
FREQ = np.append(FREQ, -np.inf)  # feature 6 is dead
MEAN = np.array([0.0, 0.0, 5.0, 1.0, -1.0, -3.0, np.nan])
MAX = np.array([1, 9, 3, 3, 2, 8, -np.inf], np.float32)
DEFAULTS = {
    "always": (),
    "n_features": 400,
    "sort": "random",
    "every": False,
    "log_freq_range": (-6, 1),
    "log_value_range": (-3, 3),
    "seed": 0,
}


def choose(part=slice(None), **settings):
    unread = {"percentile_s": np.zeros(0, np.float32), "n_active_s": np.zeros(0, np.int64)}
    table = FeatureTable(log10_freq_s=FREQ[part], log10_mean_s=MEAN[part], max_s=MAX[part], **unread)
    return choose_features(table, **DEFAULTS | settings)


def test_features_outside_the_ranges_and_dead_ones_are_left_out_unless_named():
    assert choose() == [0, 3, 4, 5]  # 1 is too rare, 2 too strong; bounds count as inside
    assert choose(always=(6, 1)) == [0, 1, 3, 4, 5, 6]
    assert choose(every=True) == [0, 1, 2, 3, 4, 5]
    assert choose(every=True, always=(6,)) == [0, 1, 2, 3, 4, 5, 6]
    assert choose(log_freq_range=(-8, -6.5)) == [1]
    assert choose(log_value_range=(0, 1)) == [0, 3]


def test_sorting_takes_the_first_by_the_figure_and_the_lower_feature_of_equals():
    assert choose(sort="freq", n_features=2) == [0, 5]
    assert choose(sort="freq", n_features=3) == [0, 3, 5]
    assert choose(sort="mean", n_features=1) == [3]
    assert choose(sort="max", n_features=2) == [3, 5]
    assert choose(sort="max", n_features=1, always=[5]) == [3, 5], "besides"


def test_the_sample_depends_on_the_seed_alone():
    samples = {tuple(choose(n_features=2, seed=seed)) for seed in range(30)}
    assert len(samples) > 3 and all(set(sample) <= {0, 3, 4, 5} for sample in samples)
    assert choose(n_features=2, seed=7) == choose(n_features=2, seed=7)


def test_nothing_to_show_and_unknown_features_are_errors():
    with pytest.raises(
        ConfigError, match=r"none of the 6 features that fired has log10 frequency in 2 to 3 .* lie in -7.00 to 0.00"
    ):
        choose(log_freq_range=(2, 3))
    for feature in (-1, 7):
        with pytest.raises(ConfigError, match=f"--features {feature}: there is no such feature; the SAE has 0 to 6"):
            choose(always=(3, feature))
    with pytest.raises(ConfigError, match="nothing to do"):
        choose(n_features=0)
    assert choose(log_freq_range=(2, 3), always=(6,)) == [6]
    assert choose(n_features=0, always=(6, 0)) == [0, 6]
    with pytest.raises(ConfigError, match="no feature of this run ever fired"):
        choose(slice(6, None))
    assert choose(slice(6, None), always=(0,)) == [0]


@st.composite
def slot_arrays(draw):
    d_sae, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    filled = draw(st.lists(st.integers(0, top_k), min_size=d_sae, max_size=d_sae))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    imgs = random.integers(0, 5, (d_sae, top_k))
    values = -np.sort(-random.integers(1, 9, (d_sae, top_k)).astype(np.float32), axis=1)
    empty = np.arange(top_k) >= np.array(filled)[:, None]
    return (
        np.where(empty, -np.inf, values).astype(np.float32),
        np.where(empty, -1, imgs),
        np.where(empty, -1, random.integers(0, 4, (d_sae, top_k))),
    )


@given(slot_arrays(), st.integers(1, 4), st.integers(1, 5))
def test_slots_are_those_of_the_strongest_distinct_images_and_each_goes_to_one_rank(arrays, n_images, n_ranks):
    values, imgs, patches = arrays
    features = list(range(0, len(values), 2))
    slots = choose_slots(features, values, imgs, patches, n_images)
    expected = []
    for feature in features:
        distinct = list(dict.fromkeys(img for img in imgs[feature].tolist() if img >= 0))[:n_images]
        for slot, img in enumerate(imgs[feature].tolist()):
            if img in distinct:
                expected.append((img, feature, patches[feature, slot], distinct.index(img), slot, values[feature, slot]))
    assert slots.tolist() == np.array(expected, SLOT).tolist()

    shares = deal(slots, n_ranks)
    assert sorted(row for share in shares for row in share.tolist()) == sorted(slots.tolist())
    owners = [set(share["feature"].tolist()) for share in shares]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for share in shares:
        assert (np.diff(share["img_i"]) >= 0).all()


def test_a_share_is_in_the_order_of_images_features_and_slots():
    imgs = np.array([[1, 0, 1, -1], [0, -1, -1, -1], [0, 1, 2, 2]])
    (share,) = deal(choose_slots(range(3), -imgs.astype(np.float32), imgs, np.zeros_like(imgs), None), 1)
    rows = share[["img_i", "feature", "slot"]].tolist()
    assert rows == sorted(rows) and len(rows) == 8


def test_slots_count_beyond_16_bits_and_images_beyond_32():
    numbers = np.arange(70_000)[None]
    scores = 1 / (1 + numbers).astype(np.float32)
    slots = choose_slots([0], scores, numbers + 2**31, numbers, None)
    assert slots["place"].tolist() == slots["slot"].tolist() == slots["patch_i"].tolist() == numbers[0].tolist()
    assert slots["img_i"].tolist() == (numbers[0] + 2**31).tolist()
    assert slots["score"].tolist() == scores[0].tolist()


def test_ranks_get_about_equally_many_images():
    random = np.random.default_rng(0)
    imgs = random.integers(0, 10_000, (300, 16))
    slots = choose_slots(range(300), np.ones((300, 16), np.float32), imgs, np.zeros_like(imgs), None)
    loads = [len(np.unique(share["img_i"])) for share in deal(slots, 7)]
    assert max(loads) < 1.05 * min(loads)
