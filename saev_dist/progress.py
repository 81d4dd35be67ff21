"""Progress of a stream: a bar on a terminal, a line every 30 s in a log file.

Names: `tok` tokens, as in the units shown.
"""

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from saev_dist.errors import tell

LOG_EVERY_S = 30.0


class Progress:
    """Tokens done, tokens/s, read MB/s and time left, on standard error.

    Args:
        job: name of what is going on.
        n_tokens: tokens that this rank has to do, or has had to.
        bytes_per_token: read for each.
        rank, size: shown where there are several ranks; on a terminal only rank 0 draws its bar.
        enabled: False shows nothing.
        n_done: of the tokens, done by an earlier attempt.
    """

    def __init__(
        self, job: str, n_tokens: int, bytes_per_token: int, *, rank: int, size: int, enabled: bool, n_done: int = 0
    ) -> None:
        self._job = job
        self._n_tokens, self._bytes_per_token = n_tokens, bytes_per_token
        self._prefix = f"[rank {rank}/{size}] " if size > 1 else ""
        self._began = self._logged = time.monotonic()
        self._done = self._done_before = n_done
        on_terminal = sys.stderr.isatty()
        self._logs = enabled and not on_terminal
        self._bar = tqdm(
            total=n_tokens,
            initial=n_done,
            desc=f"{self._prefix}{job}",
            unit="tok",
            unit_scale=True,
            disable=not (enabled and on_terminal and rank == 0),
        )

    def advance(self, n_tokens: int, n_left_out: int = 0) -> None:
        """Count tokens as done.

        Args:
            n_tokens: since the last call.
            n_left_out: tokens that will not be done, in all.
        """
        was_whole = self._done == self._bar.total
        self._done += n_tokens
        self._bar.total = total = self._n_tokens - n_left_out
        rate = (self._done - self._done_before) / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"read {rate * self._bytes_per_token / 1e6:,.0f} MB/s", refresh=False)
        self._bar.update(n_tokens)
        if self._logs and (time.monotonic() - self._logged >= LOG_EVERY_S or (self._done == total and not was_whole)):
            self._logged = time.monotonic()
            n_left = total - self._done
            left = timedelta(seconds=round(n_left / rate if n_left else 0)) if rate or not n_left else "?"
            tell(
                f"{self._prefix}{self._job} {self._done / total if total else 1:6.1%}  {self._done:,}/{total:,} tokens  "
                f"{rate:,.0f} tok/s  read {rate * self._bytes_per_token / 1e6:,.0f} MB/s  ETA {left}"
            )

    def close(self) -> None:
        self._bar.close()
