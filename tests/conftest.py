"""Settings for all tests: CI repeats the same examples, a developer's machine looks for new ones.

Tests that run side by side have one thread each: torch's threads wait for each other by spinning, five times as long
where there are more of them than cores.
"""

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("saev-dist", max_examples=60, deadline=None, derandomize="CI" in os.environ, database=None)
settings.load_profile("saev-dist")
