"""What a run of faults came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN = 8


@dataclass
class Outcome:
    """How many faults were brought about, how many were met as promised, and what the first others did.

    Attributes:
        counts: further figures by what they count.
    """

    cases: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, wrong: str | None) -> None:
        """One case: None if the promise was kept, else what happened instead."""
        self.cases += 1
        self.held += wrong is None
        if wrong is not None and len(self.failures) < SHOWN:
            self.failures.append(wrong)

    def join(self, other: Outcome) -> None:
        self.cases += other.cases
        self.held += other.held
        self.failures = (self.failures + other.failures)[:SHOWN]
        self.counts += other.counts

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"counts": dict(sorted(self.counts.items()))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        return cls(**data | {"counts": Counter(data["counts"])})
