"""Many findings of a few kinds, each said once: a line with its first tensor, how many there are, and their pattern."""

from collections.abc import Hashable, Iterable
from itertools import takewhile


class Findings:
    """`add` findings; `lines` has one for each kind, in the order in which the kinds came."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, tuple[str, list[str]]] = {}
        self._more: dict[Hashable, int] = {}

    def add(self, kind: Hashable, name: str, what: str) -> None:
        """`what` is said of the first of a kind: what was found, what was expected and what helps."""
        self._kinds.setdefault(kind, (what, []))[1].append(name)

    def count(self, kind: Hashable, more: int) -> None:
        """So many more of a kind, without their names."""
        self._more[kind] = more

    @property
    def lines(self) -> list[str]:
        return [self._line(what, names, self._more.get(kind, 0)) for kind, (what, names) in self._kinds.items()]

    def _line(self, what: str, names: list[str], more: int) -> str:
        count = len(names) + more
        if count == 1:
            return f"{names[0]}: {what}"
        return f"{names[0]}: {what}; {count:,} in all: {pattern(names)}{', ...' if more else ''}"


def pattern(names: Iterable[str]) -> str:
    """What names have in common, from dot to dot: the text, {first..last} of numbers, or * for the rest."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) == 1:
        return ".".join(map(_common, zip(*split, strict=True)))
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join([*(parts[0] for parts in shared), "*"])


def _common(parts: tuple[str, ...]) -> str:
    kinds = set(parts)
    if len(kinds) == 1:
        return parts[0]
    if all(part.isdecimal() for part in kinds):
        numbers = sorted(map(int, kinds))
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "*"
