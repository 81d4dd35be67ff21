"""Settings for all tests: CI repeats the same examples, a developer's machine looks for new ones."""

import os

from hypothesis import settings

settings.register_profile("saev-dist", max_examples=60, deadline=None, derandomize="CI" in os.environ, database=None)
settings.load_profile("saev-dist")
