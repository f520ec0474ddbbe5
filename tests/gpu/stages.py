# SPDX-License-Identifier: Apache-2.0
"""Stages of `make gpu`: a command with a time limit each, its output kept."""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 15  # seconds that an interrupted stage has to say what it found


class Deadline:
    """When everything must be done.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: what it is.
        command: its words.
        limit: seconds after which it is interrupted.
        environment: variables that it has beside the present ones.
        required: whether its failure is the whole run's.
        figures: whether it prints JSON.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    required: bool = True
    figures: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a stage.

    Args:
        stage: the stage.
        outcome: "passed", "failed (exit N)", "interrupted after N s" or "left out: why".
        seconds: it took.
        last: the last lines of its output.
        figures: what it measured, None if nothing.
    """

    stage: Stage
    outcome: str
    seconds: float = 0.0
    last: str = ""
    figures: Any = None

    @property
    def failed(self) -> bool:
        return self.stage.required and self.outcome != "passed"


def run_stage(stage: Stage, root: Path, logs: Path, deadline: Deadline) -> Result:
    """Runs a stage; its output goes to a file in `logs`.

    Args:
        stage: to run.
        root: where it runs.
        logs: folder.
        deadline: of all stages.
    """
    program = shutil.which(stage.command[0])
    limit = min(stage.limit, deadline.left())
    if program is None:
        return Result(stage, f"left out: {stage.command[0]} is not installed")
    if limit < GRACE:
        return Result(stage, "left out: no time left")
    slug = stage.name.replace(" ", "-").replace("^", "")
    paths = logs / f"{slug}.out", logs / f"{slug}.err"
    start = time.monotonic()
    with paths[0].open("w") as out, paths[1].open("w") as errors:
        process = subprocess.Popen(
            [program, *stage.command[1:]],
            cwd=root,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"} | stage.environment,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        outcome = _wait(process, limit)
    texts = [path.read_text(errors="replace") for path in paths]
    figures = None
    if stage.figures and outcome == "passed":
        figures = json.loads(texts[0])
    said = texts[1] if stage.figures or not texts[0].strip() else texts[0]
    last = "\n".join(said.strip().splitlines()[-12:])
    return Result(stage, outcome, time.monotonic() - start, last, figures)


def _wait(process: subprocess.Popen, limit: float) -> str:
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"failed (exit {code})"
    except subprocess.TimeoutExpired:
        pass
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
            break
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
    return f"interrupted after {limit:.0f} s"


def run_together(stages: list[Stage], root: Path, logs: Path, deadline: Deadline) -> list[Result]:
    """Runs stages that measure no time beside each other."""
    with ThreadPoolExecutor(max(1, len(stages))) as pool:
        return list(pool.map(lambda stage: run_stage(stage, root, logs, deadline), stages))
