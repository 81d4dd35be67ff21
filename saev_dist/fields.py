"""Typed reading of JSON that other programs wrote: a field is there, of its type and in range, or one line says so."""

import json
from collections.abc import Collection
from typing import Any, TypeVar, cast

from saev_dist.errors import SaevDistError

T = TypeVar("T")

MAX_INTEGER = 2**53
JSON_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list", dict: "an object"}


class Fields:
    """A JSON object whose members are read by name and type.

    Args:
        obj: the parsed object.
        where: what the messages call it, such as a file's path.
        error: exception type to raise.
    """

    def __init__(self, obj: Any, where: str, error: type[SaevDistError]) -> None:
        self.where, self.error = where, error
        self.obj: dict[str, Any] = self._typed(obj, dict, "the top level")

    @classmethod
    def parse(cls, text: bytes, where: str, error: type[SaevDistError]) -> "Fields":
        """Read an object from JSON text; anything else is an `error`."""
        return cls(parse_json(text, where, error), where, error)

    def get(self, names: str | tuple[str, ...], kind: type[T], default: T | None = None) -> T:
        """The member under the first of `names` that is there.

        A default of None makes the member required.
        """
        names = (names,) if isinstance(names, str) else names
        for name in names:
            if name in self.obj:
                return self._typed(self.obj[name], kind, f"field '{name}'")
        if default is None:
            raise self.error(f"{self.where} has no field '{' or '.join(names)}'; it should hold {JSON_NAMES[kind]}.")
        return default

    def positive(self, *names: str, default: int | None = None) -> int:
        """An integer of at least 1, and at most 2^53."""
        value = self.get(names, int, default)
        if not 1 <= value <= MAX_INTEGER:
            found = value if value < 1 else f"{float(value) if value < 1e300 else 'huge'}"
            raise self.error(f"{self.where}: field '{' or '.join(names)}' is {found}; it should be at least 1, and sane.")
        return value

    def count(self, name: str, *, most: int) -> int:
        """An integer of at least 0, and at most `most`."""
        value = self.get(name, int)
        if not 0 <= value <= most:
            found = value if abs(value) <= MAX_INTEGER else "huge"
            raise self.error(f"{self.where}: field '{name}' is {found}; it should be at least 0, and at most {most:,}.")
        return value

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Raise unless every member is one of `known`."""
        if strangers := sorted(set(self.obj) - set(known)):
            raise self.error(
                f"{self.where} has fields that this version does not know ({', '.join(strangers)[:200]}); they may change what "
                "the file means. Take them out if you know that they do not."
            )

    def sub(self, name: str) -> "Fields":
        """The object under `name`, required."""
        return Fields(self.get(name, dict), f"{self.where}, '{name}'", self.error)

    def _typed(self, value: Any, kind: type[T], what: str) -> T:
        if kind is float and type(value) is int:
            try:
                return cast(T, float(value))
            except OverflowError:
                raise self.error(f"{self.where}: {what} is beyond any float; it should be a number.") from None
        # bool is a subclass of int in Python, not in JSON
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = json.dumps(value)
            found = found if len(found) <= 60 else found[:57] + "..."
            raise self.error(f"{self.where}: {what} is {found}; it should be {JSON_NAMES[kind]}.")
        return value


def parse_json(text: bytes, where: str, error: type[SaevDistError]) -> Any:
    """Parse JSON text of any shape; text that is not JSON, or says a thing twice, is an `error`."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        obj = dict(pairs)
        if len(obj) < len(pairs):
            raise ValueError("an object names a member twice")
        return obj

    try:
        return json.loads(text, object_pairs_hook=members)
    except (ValueError, RecursionError) as err:
        raise error(f"{where} is not JSON ({err}); it may be truncated, or another kind of file.") from None
