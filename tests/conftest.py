"""Settings for all tests: CI repeats the same few examples, a developer's machine looks for new ones.

Tests that run side by side have one thread each: torch's threads wait for each other by spinning, five times as long
where there are more of them than cores.
"""

import os
import platform
import shutil
from importlib.util import find_spec

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, or one of them is left at the end while the other workers have nothing to do.

    Those of Slurm, of ranks that die and of local jobs wait most of their time: one after another, while others compute.
    """
    slow = "slurm disk resume replay_resume replay world replay_faults memory readme demo local_jobs lock pictures launch"
    order = {f"test_{name}.py": place for place, name in enumerate(slow.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


on_ci = "CI" in os.environ
settings.register_profile("saev-dist", max_examples=15 if on_ci else 60, deadline=None, derandomize=on_ci, database=None)
settings.load_profile("saev-dist")


def pytest_configure() -> None:
    """On CI no test may skip for want of a package that the extra `test` installs."""
    wanted = ["datasets", "scipy", "skimage"] + ["triton"] * (platform.machine() == "x86_64")
    if on_ci and (absent := [name for name in wanted if find_spec(name) is None]):
        raise pytest.UsageError(f"CI is set, and {', '.join(absent)} is not installed: install the extra `test`.")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts ranks that die, or to which the disk refuses something; skips where there is no compiler. One for each worker."""
    from tests.crash import FaultyServer, compile_faults  # after torch's settings above

    dpath = tmp_path_factory.mktemp("server")
    with FaultyServer(dpath, compile_faults(dpath)) as server:
        yield server


@pytest.fixture(scope="session")
def whole(tmp_path_factory, server):
    """Shards, an SAE, the command for them, and the hashes of an uninterrupted run."""
    from tests.ranks import artifact_hashes  # after torch's settings above
    from tests.synthetic import make_command

    dpath = tmp_path_factory.mktemp("whole")
    args = make_command(dpath, "--snapshot-every", 0)
    codes, output = server.run(*args, dpath / "run")
    assert codes == [0], output
    return args, artifact_hashes(dpath / "run"), dpath / "shards"


@pytest.fixture
def long_run(tmp_path):
    """The command for 360 batches of one image: half a minute on three ranks where they are SLOW; the value of --out is to follow."""
    from tests.synthetic import make_acts, make_sae, make_shards  # after torch's settings above

    shards, sae = make_shards(tmp_path / "shards", make_acts(360), imgs_per_shard=120), make_sae(tmp_path / "sae.pt")
    small = ["--batch-tokens", 5, "--top-k", 4, "--self-check", "off", "--no-progress", "--n-distributions", 0]
    return ["extract", "--shards", shards, "--sae", sae, *small, "--out"]


@pytest.fixture
def inputs(tmp_path):
    """Flags of an `extract` that names shards and an SAE, with which it takes a moment; --out is to follow."""
    from tests.synthetic import make_inputs  # after torch's settings above

    return make_inputs(tmp_path)


@pytest.fixture
def copy_sae(tmp_path):
    """A copy of one of the SAEs of other programs, which a test may spoil."""
    from tests.sae_files import DATA  # after torch's settings above

    return lambda name: shutil.copytree(DATA / name, tmp_path / name)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A gallery of 60 features."""
    from tests.pages import DEAD, SHOWN, write_gallery  # after torch's settings above

    return write_gallery(tmp_path_factory.mktemp("small") / "a folder" / "visuals", d_sae=60, shown=SHOWN, dead=DEAD)


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A gallery of 16,000 features, 400 of them with pictures."""
    from tests.pages import write_gallery  # after torch's settings above

    dpath = tmp_path_factory.mktemp("large") / "visuals"
    return write_gallery(dpath, d_sae=16_000, shown=tuple(range(0, 16_000, 40)), dead=(5,))


@pytest.fixture(scope="module")
def browser():
    from tests.browsing import started  # after torch's settings above

    with started() as chrome:
        yield chrome


@pytest.fixture
def visit(browser):
    """Opens a gallery; in the end nothing may be on the console, and nothing requested from outside of its folder."""
    from tests.browsing import visiting  # after torch's settings above

    with visiting(browser) as open_page:
        yield open_page
