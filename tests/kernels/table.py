# SPDX-License-Identifier: Apache-2.0
"""What every compiled kernel needs on each GPU architecture, as a table."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from kernels.occupancy import LIMITS, blocks_per_multiprocessor

HEAD = (
    "kernel",
    "config",
    "arch",
    "threads",
    "registers",
    "spilled",
    "shared",
    "blocks/SM",
    "warps",
    "instructions",
)


class Skipped(Exception):
    """A part has nothing to compile with; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration, compiled for one architecture.

    Args:
        backend: "cuda" or "triton".
        source: the file it is written in, relative to the repository.
        kernel: its name, with its template arguments.
        config: what else tells it from other compilations of the same kernel, "" if nothing.
        arch: "sm_80", "sm_90a", "sm_100", "gfx942".
        threads: of a block.
        registers: of a thread.
        spilled: bytes that registers did not hold, stores and loads together.
        shared: bytes of shared memory of a block, as far as they are known when it is compiled.
        instructions: {name: how often it stands in the machine code}, those that are there.
        problems: what is wrong with it, beside spills; any makes `make kernels` fail.
    """

    backend: str
    source: str
    kernel: str
    config: str
    arch: str
    threads: int
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def blocks(self) -> int | None:
        """Blocks that run together on a multiprocessor; None where its limits are not known."""
        if self.arch not in LIMITS:
            return None
        return blocks_per_multiprocessor(self.arch, self.threads, self.registers, self.shared)

    @property
    def occupancy(self) -> float | None:
        """Warps that run together on a multiprocessor, as a fraction of the most it can hold."""
        if self.blocks is None:
            return None
        return self.blocks * -(-self.threads // 32) / LIMITS[self.arch].warps

    def defects(self) -> list[str]:
        """Everything that must not be, one sentence each."""
        found = list(self.problems)
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.blocks == 0:
            found.append("a block does not fit on a multiprocessor")
        name = " ".join(filter(None, (self.kernel, self.config, "on", self.arch)))
        return [f"{name}: {text}" for text in found]


def markdown(rows: Iterable[Row]) -> str:
    """One table of Markdown per source, one line per row."""
    return "\n".join(
        f"## {source}\n\n{_table(group)}"
        for source, group in groupby(
            sorted(rows, key=lambda row: (row.source, row.kernel, row.config)),
            key=lambda row: row.source,
        )
    )


def _table(rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for row in rows:
        blocks = "" if row.blocks is None else row.blocks
        warps = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        counts = ", ".join(f"{name} {count}" for name, count in row.instructions.items())
        cells = (row.kernel, row.config, row.arch, row.threads, row.registers, row.spilled)
        cells += (row.shared, blocks, warps, counts)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: list[Row], facts: dict[str, str]) -> None:
    """Writes table.md and table.json; `facts` are versions and what was skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    head = "".join(f"{name}: {value}  \n" for name, value in facts.items())
    text = f"# Resources of the compiled kernels\n\n{head}\n{markdown(rows)}"
    (folder / "table.md").write_text(text, encoding="utf-8")
    found = [
        asdict(row) | {"blocks": row.blocks, "occupancy": row.occupancy, "defects": row.defects()}
        for row in rows
    ]
    (folder / "table.json").write_text(
        json.dumps({"facts": facts, "rows": found}, indent=1) + "\n", encoding="utf-8"
    )
