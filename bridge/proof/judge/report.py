"""A judgement in words."""

from collections.abc import Sequence

from bridge.proof.judge.verdict import Judgement


def sentences(judgement: Judgement) -> list[tuple[str, str]]:
    """What is wrong and why something cannot be run: (a name, or the layouts; a sentence), each once."""
    failures: dict[str, list[str]] = {}
    for layout in judgement.layouts:
        if layout.failure is not None:
            failures.setdefault(layout.failure.reason, []).append(layout.layout)
    cannot = [("; ".join(layouts), f"cannot be run: {reason}") for reason, layouts in failures.items()]
    return [*judgement.faults, *cannot]


def traceback_of(judgement: Judgement) -> tuple[str, ...]:
    """The end of the traceback of the first layout that cannot be run."""
    return next((layout.failure.traceback for layout in judgement.layouts if layout.failure is not None), ())


def text(judgement: Judgement) -> str:
    """All of it as lines: each layout and its worst error, then the sentences."""
    found = [f"{judgement.target} ({judgement.kind}, {judgement.dtype}) {judgement.status}"]
    for layout in judgement.layouts:
        worst = layout.differing[:1]
        said = f": {worst[0][0]} is off by {worst[0][1]:.1e}, rounding explains {layout.bound:.1e}" if worst else ""
        found.append(f"  {layout.layout}: {layout.status}{said}")
    found += [f"{name}: {sentence}" for name, sentence in sentences(judgement)]
    return "\n".join([*found, *traceback_of(judgement)])


def kinds(names: Sequence[str]) -> list[str]:
    """Names of layers and experts alike once, with `*` for the numbers."""
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))
