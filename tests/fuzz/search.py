# SPDX-License-Identifier: Apache-2.0
"""Run many cases; shrink those that fail."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import ExampleDatabase

from fuzz.cases import Case, Tally, cases
from fuzz.networks import FAMILIES

CHUNK = 250
# A failing case is made smaller in at most this many runs.
SHRINK_RUNS = 300


class _SmallEnough(BaseException):
    """Ends shrinking; hypothesis takes an Exception for a failure of the case."""


@dataclass
class Failure:
    """A case that went wrong, as small as it could be made: a program that can be run."""

    source: str
    error: str


class Search:
    """Runs cases, all of them different, and counts.

    Args:
        families: of networks.
        database: keeps failing cases between searches, which run them first; None for none.
        tick: called with the number of cases after each.
    """

    def __init__(
        self,
        families: tuple[str, ...] = FAMILIES,
        database: ExampleDatabase | None = None,
        tick: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.tally = Tally()
        self.failures: list[Failure] = []
        self._families = families
        self._database = database
        self._tick = tick
        self._seen: set[str] = set()
        self._shrinking: Failure | None = None
        self._shrink_runs = 0
        self._goal = 0

    @property
    def count(self) -> int:
        """Number of cases that have run."""
        return self.tally.cases + len(self.failures)

    def run(self, count: int, start: int, most_failures: int | None = None) -> None:
        """Run until ``count`` cases have run, or that many have failed.

        Chunks take ``start`` and the numbers after it as seeds. Every chunk begins with the
        simplest case, which counts once, and ends with the first case that fails.
        """
        self._goal = count
        phases = [Phase.reuse, Phase.generate, Phase.shrink]
        while self.count < self._goal and len(self.failures) != most_failures:
            self._chunk(start, phases)
            start += 1
            # Failing cases of earlier searches have had their turn.
            phases = [Phase.generate, Phase.shrink]

    def stop(self) -> None:
        """End a run after the case in progress; a failing one is still made small."""
        self._goal = self.count

    def _chunk(self, start: int, phases: list[Phase]) -> None:
        # In this order: ``seed`` alone would switch the database off.
        @settings(
            max_examples=CHUNK,
            database=self._database,
            deadline=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @seed(start)
        @given(cases(self._families))
        def draw_cases(case: Case) -> None:
            self._one(case)

        self._shrinking, self._shrink_runs = None, 0
        try:
            draw_cases()
        except (Exception, _SmallEnough):
            if self._shrinking is None:
                raise
            self.failures.append(self._shrinking)
            self._tick(self.count)

    def _one(self, case: Case) -> None:
        source = str(case)
        if self._shrinking is None:
            if source in self._seen or self.count >= self._goal:
                return
            self._seen.add(source)
        else:
            self._shrink_runs += 1
            if self._shrink_runs > SHRINK_RUNS:
                raise _SmallEnough
        try:
            with warnings.catch_warnings():
                # InstanceNorm without parameters takes any width, and says so.
                warnings.filterwarnings("ignore", "input's size at dim=1 does not match")
                outcome = case.run()
        except Exception:
            # The last to fail is the smallest.
            self._shrinking = Failure(source, traceback.format_exc(limit=-3))
            raise
        if self._shrinking is None:
            self.tally.add(case, outcome)
            self._tick(self.count)
