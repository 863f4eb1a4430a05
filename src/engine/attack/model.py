"""What an attack is, what was seen, and the verdict. It sends nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from engine.attack.stage import Stage

__all__ = [
    "DURATION_MAX_S",
    "IDLE_MAX",
    "RATE_MAX",
    "Attack",
    "Case",
    "Need",
    "NotRun",
    "Options",
    "Result",
    "Trial",
    "Undecided",
    "Verdict",
]

RATE_MAX: Final = 2_000
"""The highest rate of a flood: requests, or handshakes, a second."""
DURATION_MAX_S: Final = 60.0
"""The longest flood."""
IDLE_MAX: Final = 10_000
"""The most connections that are held open and idle at a time."""
CASES_KEPT: Final = 400
"""Cases of one attack that are kept with their text; the others are counted."""
TEXT_MAX: Final = 240

Need = Literal["second", "node"]


class Verdict(StrEnum):
    """``UNDECIDED``: a control failed or nothing could be tried, so nothing was shown."""

    HELD = "held"
    FAILED = "FAILED"
    UNDECIDED = "undecided"
    NOT_RUN = "not run"


class Undecided(Exception):
    """A control failed: whatever was refused may have been refused for another reason."""


class NotRun(Exception):
    """The attack can't be played here; the text says what it lacks."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is sent. ``rate`` and ``duration_s`` are of each flood, ``idle`` of connections; ``seed`` of choices."""

    seed: int = 1
    rate: int = 400
    duration_s: float = 3.0
    idle: int = 1_000
    quick: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.rate <= RATE_MAX:
            raise ValueError(f"a rate of {self.rate}; 1 to {RATE_MAX} a second are allowed")
        if not 0.1 <= self.duration_s <= DURATION_MAX_S:
            raise ValueError(f"a duration of {self.duration_s:g} s; 0.1 to {DURATION_MAX_S:g} are allowed")
        if not 1 <= self.idle <= IDLE_MAX:
            raise ValueError(f"{self.idle} idle connections; 1 to {IDLE_MAX} are allowed")


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack: what its player would gain (``wants``), and what must be seen instead (``must``).

    ``reference`` names the threat in docs/security.md and, where there is one, the weakness (CWE), RFC or ZeroMQ RFC.
    ``needs`` are identities beside the first client's; ``slow`` ones are left out of a quick run.
    """

    id: str
    title: str
    wants: str
    must: str
    reference: str
    run: Callable[[Stage, Trial], None]
    needs: frozenset[Need] = frozenset()
    slow: bool = False

    @property
    def group(self) -> str:
        """The first part of the id."""
        return self.id.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that was tried: at whom, what came back, and whether that is what must come."""

    what: str
    at: str
    seen: str
    held: bool


@dataclass(slots=True)
class Trial:
    """What one attack has seen so far."""

    tried: int = 0
    controls: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    failures: list[Case] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    figures: dict[str, float | int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def control(self, good: bool, what: str, seen: str = "") -> None:
        """The honest form works; else the attack is undecided from here on."""
        if not good:
            raise Undecided(f"control: {what}: {seen or 'it did not work'}"[: 2 * TEXT_MAX])
        self.controls.append(what)

    def case(self, held: bool, what: str, at: str, seen: str) -> None:
        """Note what came back; ``seen`` begins with a short word for it, such as an error code."""
        self.tried += 1
        self.seen[seen.partition(":")[0][:60]] += 1
        found = Case(what, at, seen[:TEXT_MAX], held)
        if not held and len(self.failures) < CASES_KEPT:
            self.failures.append(found)
        if len(self.cases) < CASES_KEPT:
            self.cases.append(found)

    def note(self, text: str) -> None:
        """Say something that a reader of the report must know."""
        self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Result:
    """An attack with its verdict; ``reason`` says why it was not run or is undecided, or what failed."""

    attack: Attack
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0
    trial: Trial = field(default_factory=Trial)
