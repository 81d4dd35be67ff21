"""PURE. An identity says what the bytes of a run or a gallery depend on, as a JSON object. Two of them, compared."""

import json
from typing import Any

MOST_OF_ENTRY = 60
"""Characters of an entry that one of two lists alone has."""


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names under which two identities say different things; either may have been through JSON."""
    return [key for key in sorted(mine | theirs) if not _same(mine.get(key), theirs.get(key))]


def contrast(mine: Any, theirs: Any, *, most: int = 20) -> tuple[str, str]:
    """Two values of an identity that differ, for a message; of lists the first entries that differ, or that one alone has.

    Args:
        most: characters of each.
    """
    if isinstance(mine, list) and isinstance(theirs, list):
        if len(mine) != len(theirs):
            return _describe(mine, theirs), _describe(theirs, mine)
        i = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if None not in pair and pair[0] != pair[1])
        return f"[{i}] {_brief(mine[i], most)}", f"[{i}] {_brief(theirs[i], most)}"
    return _brief(mine, most), _brief(theirs, most)


def _describe(entries: list[Any], others: list[Any]) -> str:
    known = set(map(json.dumps, others))
    alone = [entry for entry in entries if json.dumps(entry) not in known]
    return f"a list of {len(entries):,}" + (f" with {_brief(alone[0], MOST_OF_ENTRY)}" if alone else "")


def _brief(value: Any, most: int) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[: most - 3]}…"


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two values of an identity are the same; None in a list stands for what could not be read."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return all(None in pair or pair[0] == pair[1] for pair in zip(mine, theirs, strict=True))
    return bool(mine == theirs)
