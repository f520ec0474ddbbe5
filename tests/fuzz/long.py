# SPDX-License-Identifier: Apache-2.0
"""A long search in several processes (``make fuzz``)."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import queue
import time
from pathlib import Path
from typing import Any

import torch
from hypothesis.database import DirectoryBasedExampleDatabase
from tqdm import tqdm

from fuzz.cases import Tally
from fuzz.search import Failure, Search

SEEDS_APART = 1_000_000


def work(number: int, count: int, seed: int, minutes: float, folder: Path, results: Any) -> None:
    """One process: reports every case, then its totals.

    Args:
        number: of the process.
        count: cases to run.
        seed: of the whole search.
        minutes: after which no new case begins.
        folder: for the database of failing cases.
        results: queue that gets (number, None) for each case, then (number, totals).
    """
    torch.set_num_threads(1)
    # Memory that a kernel forgets to write is NaN.
    torch.use_deterministic_algorithms(True)
    database = DirectoryBasedExampleDatabase(folder / f"database-{number}")
    parent = multiprocessing.parent_process()
    end = time.monotonic() + 60 * minutes

    def tick(count: int) -> None:
        if parent is not None and not parent.is_alive():
            os._exit(1)  # killed: nobody waits for the results
        results.put((number, None))
        if time.monotonic() > end:
            search.stop()

    search = Search(database=database, tick=tick)
    search.run(count, seed + number * SEEDS_APART)
    results.put((number, (search.tally, search.failures)))


def gather(processes: list[Any], results: Any, cases: int) -> tuple[Tally, list[Failure]]:
    """Show progress until every process has reported its totals.

    Raises:
        RuntimeError: a process ended without.
    """
    tally, failures, waiting = Tally(), [], set(range(len(processes)))
    with tqdm(total=cases, unit="case") as bar:
        while waiting:
            try:
                number, totals = results.get(timeout=5.0)
            except queue.Empty:
                if any(not processes[number].is_alive() for number in waiting):
                    raise RuntimeError("a process ended before its search did") from None
                continue
            if totals is None:
                bar.update()
                continue
            waiting.remove(number)
            tally.merge(totals[0])
            failures += totals[1]
    return tally, failures


def main() -> int:
    """The command line; returns 1 where a case was wrong."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier than that")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("wrong-*.py"):
        old.unlink()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    each, rest = divmod(arguments.cases, arguments.processes)
    processes = [
        context.Process(
            target=work,
            args=(
                i,
                each + (i < rest),
                arguments.seed,
                arguments.minutes,
                arguments.out,
                results,
            ),
            daemon=True,
        )
        for i in range(arguments.processes)
    ]
    for process in processes:
        process.start()
    tally, failures = gather(processes, results, arguments.cases)
    for process in processes:
        process.join()
    print(tally.table(), end="\n\n")
    for number, failure in enumerate(failures, 1):
        path = arguments.out / f"wrong-{number}.py"
        path.write_text(failure.source)
        print(f"{path}:\n{failure.source}\n{failure.error}")
    print(tally.line(len(failures)))
    return 1 if failures else 0
