"""Progress in a log file: it ends at 100 %, once, whatever was left out."""

import pytest

from saev_dist.progress import Progress


def shares(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split()[1:3] for line in capsys.readouterr().err.splitlines()]


def make(n_tokens: int, **settings: int) -> Progress:
    return Progress("extract", n_tokens, 4, rank=0, size=1, enabled=True, **settings)


def test_the_last_line_is_of_all_tokens(capsys):
    progress = make(100, n_done=40)
    progress.advance(30)
    assert shares(capsys) == []  # 30 s have not passed
    progress.advance(30)
    assert shares(capsys) == [["100.0%", "100/100"]]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_what_is_left_out_is_not_waited_for(capsys, at_the_end):
    progress = make(100)
    progress.advance(50, 0 if at_the_end else 20)
    progress.advance(30, 0 if at_the_end else 20)
    assert shares(capsys) == ([] if at_the_end else [["100.0%", "80/80"]])
    progress.advance(0, 20)
    assert shares(capsys) == ([["100.0%", "80/80"]] if at_the_end else [])


def test_a_share_of_which_nothing_can_be_read_is_done(capsys):
    progress = make(100)
    progress.advance(0, 100)
    assert capsys.readouterr().err.split()[1:] == [
        "100.0%",
        "0/0",
        "tokens",
        "0",
        "tok/s",
        "read",
        "0",
        "MB/s",
        "ETA",
        "0:00:00",
    ]
