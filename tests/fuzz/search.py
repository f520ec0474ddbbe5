# SPDX-License-Identifier: Apache-2.0
"""Run many cases, shrink what fails."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.database import ExampleDatabase

from fuzz.cases import Case, Tally, cases, run_case
from fuzz.networks import FAMILIES


@dataclass
class Failure:
    """A case that went wrong, as small as it could be made."""

    case: Case
    error: BaseException

    def __str__(self) -> str:
        lines = traceback.format_exception(self.error)
        return f"{self.case}\n# {'# '.join(lines[-3:])}"


class Search:
    """Cases that are all different.

    Args:
        families: of networks.
        database: keeps failing examples between searches; None for none.
        derandomize: draw the same cases every time.
    """

    def __init__(
        self,
        families: tuple[str, ...] = FAMILIES,
        database: ExampleDatabase | None = None,
    ) -> None:
        self.tally = Tally()
        self.failures: list[Failure] = []
        self._families = families
        self._database = database
        self._seen: set[int] = set()
        self._failing = False
        self._last: Failure | None = None

    def run(self, count: int, start: int, chunk: int = 250, tick: Callable[[int], object] = int) -> None:
        """Run until ``count`` cases have run; a chunk that fails is shrunk and ends there.

        Args:
            count: cases of this call.
            start: seed of the first chunk; the next chunks follow it.
            chunk: cases drawn from one seed.
            tick: told the number of cases run so far, after each.
        """
        goal = self.tally.cases + len(self.failures) + count
        while (left := goal - self.tally.cases - len(self.failures)) > 0:
            self._chunk(min(chunk, left), start, tick)
            start += 1

    def _chunk(self, count: int, start: int, tick: Callable[[int], object]) -> None:
        self._failing, self._last = False, None

        @seed(start)
        @settings(
            max_examples=count,
            database=self._database,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            print_blob=False,
        )
        @given(cases(self._families))
        def one(case: Case) -> None:
            self._one(case)
            tick(self.tally.cases + len(self.failures))

        try:
            one()
        except BaseException:
            if self._last is None:
                raise
            self.failures.append(self._last)

    def _one(self, case: Case) -> None:
        key = hash(str(case))
        if key in self._seen and not self._failing:
            return
        self._seen.add(key)
        try:
            with warnings.catch_warnings():
                # InstanceNorm without parameters says that it takes any width.
                warnings.filterwarnings("ignore", "input's size at dim=1 does not match")
                outcome = run_case(case)
        except Exception as error:
            # Hypothesis runs the smallest failing case last.
            self._failing, self._last = True, Failure(case, error)
            raise
        if not self._failing:
            self.tally.add(case, outcome)
