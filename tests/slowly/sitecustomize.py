"""On PYTHONPATH it makes each batch of an `extract` take a while, at no cost: a test can strike in the middle.

Where SAEV_DIST_STAYS is set, a job's first attempt does some batches, and no more until it has a signal.
"""

import os
import time
from types import FrameType

from saev_dist.progress import Progress
from saev_dist.signals import Signals

BATCH_S = 0.02
STAYS_AT, STAYS_S = 30, 120.0
"""A batch, and how long at most."""
advance, note = Progress.advance, Signals._note
n_batches, is_told = 0, False


def advance_slowly(self: Progress, n_tokens: int, n_left_out: int = 0) -> None:
    global n_batches
    if self._job == "extract":
        n_batches += 1
        stays = "SAEV_DIST_STAYS" in os.environ and n_batches >= STAYS_AT and os.environ["SLURM_RESTART_COUNT"] == "0"
        until = time.monotonic() + (STAYS_S if stays else BATCH_S)
        while not is_told and time.monotonic() < until:
            time.sleep(BATCH_S)
    advance(self, n_tokens, n_left_out)


def note_here(self: Signals, number: int, frame: FrameType | None) -> None:
    global is_told
    is_told = True
    note(self, number, frame)


Progress.advance, Signals._note = advance_slowly, note_here  # type: ignore[method-assign]
