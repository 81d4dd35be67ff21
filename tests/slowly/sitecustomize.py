"""On PYTHONPATH it makes each batch of an `extract` take a while, at no cost: a test can strike in the middle."""

import time

from saev_dist.progress import Progress

BATCH_S = 0.02
advance = Progress.advance


def advance_slowly(self: Progress, n_tokens: int, n_left_out: int = 0) -> None:
    if self._job == "extract":
        time.sleep(BATCH_S)
    advance(self, n_tokens, n_left_out)


Progress.advance = advance_slowly  # type: ignore[method-assign]
