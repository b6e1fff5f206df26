"""What the judge found: at each layout, and altogether."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from bridge.proof.judge.failure import Failure
from bridge.proof.judge.target import Kind
from reference.diagnosis import Diagnosis, Verdict


class Status(StrEnum):
    """What came of a run."""

    HOLDS = "holds"
    DIFFERS = "differs"
    CANNOT_RUN = "cannot be run"


EXIT_STATUS = {Status.HOLDS: 0, Status.DIFFERS: 1, Status.CANNOT_RUN: 2}  # of the command


class Fault(NamedTuple):
    """Something that is wrong: its name, and what a reader is told."""

    name: str
    sentence: str


@dataclass(frozen=True)
class LayoutVerdict:
    """What was found at one layout.

    Args:
        layout: its name.
        bound: the largest relative error that rounding explains.
        errors: the relative error of everything that was compared.
        faults: what is wrong, and why.
        diagnosis: of what differs in the first step; None where nothing does.
        failure: why it could not be run.
    """

    layout: str
    bound: float
    errors: dict[str, float]
    faults: tuple[Fault, ...] = ()
    diagnosis: Diagnosis | None = None
    failure: Failure | None = None

    @property
    def status(self) -> Status:
        """Whether everything was compared and is within the bound."""
        if self.failure is not None:
            return Status.CANNOT_RUN
        return Status.DIFFERS if self.faults else Status.HOLDS

    @property
    def differing(self) -> list[tuple[str, float]]:
        """What is beyond the bound, worst first."""
        found = [(name, error) for name, error in self.errors.items() if not error <= self.bound]
        return sorted(found, key=lambda item: -item[1])


@dataclass(frozen=True)
class Judgement:
    """What was found of a target; `notes` are what is remarkable and not wrong."""

    target: str
    kind: Kind
    dtype: str
    layouts: tuple[LayoutVerdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """It differs if it does at any layout; it holds if it does at all of them."""
        found = {layout.status for layout in self.layouts}
        return next(status for status in (Status.DIFFERS, Status.CANNOT_RUN, Status.HOLDS) if status in found)

    @property
    def exit_status(self) -> int:
        """The command's."""
        return EXIT_STATUS[self.status]

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Of all layouts, each once."""
        return tuple(dict.fromkeys(fault for layout in self.layouts for fault in layout.faults))


def faults_of(diagnosis: Diagnosis) -> list[Fault]:
    """A diagnosis as a reader is told: every law of every explanation."""
    if diagnosis.verdict is Verdict.UNEXPLAINED:
        return [Fault("unexplained", _unexplained(diagnosis))]
    found = [Fault(law.name, law.sentence) for laws in diagnosis.explanations for law in laws]
    if len(diagnosis.explanations) > 1:
        one_of = "; ".join(" and ".join(law.name for law in laws) for laws in diagnosis.explanations)
        found.append(Fault("one of these", f"They cannot be told apart here, and it is one of: {one_of}"))
    return list(dict.fromkeys(found))


def _unexplained(diagnosis: Diagnosis) -> str:
    closest = diagnosis.closest
    if closest is None or closest.share <= 0:
        return "No mistake that is known gives these numbers, nor any two of them together."
    names = " and ".join(f"{law.name!r}" for law in closest.laws)
    return (
        "No mistake that is known gives these numbers, nor any two of them together. The nearest is "
        f"{names}, which explains {closest.share:.0%} of the difference."
    )
