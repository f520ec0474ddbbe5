# SPDX-License-Identifier: Apache-2.0
"""README's tables of figures, from the files that the benchmarks wrote."""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l0kernels.recipes.published import RECIPES

from . import two_passes
from .figures import OURS, Figure, Sheet, markdown, put_between, shown
from .memory import BASE, peaks_of
from .timing import interval_of_median, middle_run, ratios_of_middle_run

BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
NOTHING = "No file of the suite has been recorded yet.\n"
STEPS = ("masked-nchw", "masked-best", "dense", "oracle", "oracle-onednn", "index-select")
OPERATORS = ("plain", "reference", "oracle")
# From this open fraction on hardly anything can be skipped.
NEARLY_ALL = 0.9
# Of the speed-up over the masked network at its best, what counts as not slower.
NOT_SLOWER = 0.98
# Settings of a recipe that its row names, or that follow from those.
IN_THE_ROW = ("epochs", "milestones", "lam", "rounds")


def sheets(folder: Path) -> list[Sheet]:
    """Return what all CSV files of the suite under a folder hold; other tables are left out."""
    found = []
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            head = next(csv.reader(file), [])
        if "command" in head:
            found.append(Sheet.load(path))
    return found


def tables(folder: Path) -> str:
    """Return a table per kind of figure under a folder, each row with its command."""
    found = sheets(folder)
    steps = [row for sheet in found for row in step_rows(sheet)]
    others = [row for sheet in found for row in operator_rows(sheet)]
    peaks = [row for sheet in found for row in memory_rows(sheet)]
    passes = [(*row, f"`{sheet.command}`") for sheet in found for row in two_passes.rows(sheet)]
    runs, nearly = list(run_rows(folder)), list(nearly_open_rows(folder))
    last = ("faster than ours", "command")
    step = ("network", "dtype", "open", "ours [ms]", *over(STEPS), *last)
    op = ("operator", "pass", "shape", "dtype", "open", "ours [ms]", *over(OPERATORS), *last)
    memory = ("network", "variant", "open", "peak [MB]", f"/ {BASE}", "command")
    never = ("network", "open", "masked-best / ours", "95 % interval", "shown slower")
    trained = list(recipe_rows(folder))
    recipe = (
        "recipe",
        "epochs",
        "lam x n",
        "seed",
        "error",
        "weights left",
        "open units",
        "published: error, weights left, open units",
        "command",
    )
    run = ("recipe", "seed", "speed-up", "work left", "eta_run", "losses", "command")
    kinds = (
        ("Training steps", 2, steps, step),
        (
            f"Never slower? (Slower is a median whose interval ends below {NOT_SLOWER})",
            1,
            nearly,
            never,
        ),
        ("The second pass of ARM", 1, passes, (*two_passes.HEAD, "command")),
        ("Operators", 4, others, op),
        ("Peak memory of a step", 2, peaks, memory),
        ("Whole runs", 1, runs, run),
        ("Recipes beside the published figures (test gates)", 1, trained, recipe),
    )
    parts = [
        f"{title}:\n\n{markdown(head, rows, left)}\n" for title, left, rows, head in kinds if rows
    ]
    if not parts:
        return NOTHING
    return "\n".join([*parts, *(f"- {line}" for line in places(found))]) + "\n"


def over(arms: Sequence[str]) -> list[str]:
    return [f"{name} / ours" for name in arms]


def ratios_to(ours: Figure, sheet: Sheet) -> dict[str, float]:
    """Return how many times as long as ours the other arms take, by name."""
    return {
        other.impl: other.p50_ms / ours.p50_ms
        if other.over_ours is None
        else other.over_ours.median
        for other in sheet.figures
        if other.problem == ours.problem
        and other.impl != ours.impl
        and other.p50_ms
        and ours.p50_ms
    }


def step_rows(sheet: Sheet) -> Iterator[tuple[str, ...]]:
    """Return a row per network and open fraction."""
    for figure in sheet.figures:
        if figure.op == "step" and figure.impl in OURS:
            ratios = ratios_to(figure, sheet)
            yield (
                figure.shape,
                figure.dtype,
                f"{figure.open:g}",
                shown(figure.p50_ms, ".3g"),
                *(shown(ratios.get(name), ".2f") for name in STEPS),
                ", ".join(name for name, ratio in ratios.items() if ratio < 1),
                f"`{sheet.command}`",
            )


def nearly_open_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """Return a row per network and open fraction of at least `NEARLY_ALL`, from steps' rounds."""
    for path in sorted(folder.rglob("step.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        setting = found["setting"]
        if not {"masked-best", "ours"} <= set(found["variants"]):
            continue
        optimizer = ", l0.optim.SGD" if setting.get("optimizer") == "open-rows" else ""
        for row in found["rows"]:
            if row["keep"] < NEARLY_ALL or setting.get("trained"):
                continue
            arms = row["times"], "masked-best", "ours"
            median = middle_run(*arms).median
            low, high = interval_of_median(ratios_of_middle_run(*arms))
            yield (
                f"{setting['model']} batch {setting['batch']}{optimizer}",
                f"{row['keep']:g}",
                f"{median:.3f}",
                f"{low:.3f} - {high:.3f}",
                "no" if max(median, high) >= NOT_SLOWER else "yes",
            )


def operator_rows(sheet: Sheet) -> Iterator[tuple[str, ...]]:
    """Return a row per problem and implementation of ours, with all open fractions in it."""
    problems: dict[tuple[str, ...], list[Figure]] = {}
    for figure in sheet.figures:
        if figure.op not in ("step", "arm", "memory") and figure.impl in OURS:
            what = (figure.op, figure.part, figure.shape, figure.dtype, figure.impl)
            problems.setdefault(what, []).append(figure)
    for (op, part, shape, dtype, impl), figures in problems.items():
        ratios = {f"{figure.open:g}": ratios_to(figure, sheet) for figure in figures}
        losses = {
            name: [keep for keep, found in ratios.items() if found.get(name, 1.0) < 1]
            for name in dict.fromkeys(name for found in ratios.values() for name in found)
        }
        yield (
            f"{op}, {impl}",
            part,
            shape,
            dtype,
            " / ".join(ratios),
            " / ".join(shown(figure.p50_ms, ".3g") for figure in figures),
            *(
                " / ".join(shown(found.get(name), ".2f") for found in ratios.values())
                for name in OPERATORS
            ),
            "; ".join(f"{name} at {', '.join(keeps)}" for name, keeps in losses.items() if keeps),
            f"`{sheet.command}`",
        )


def run_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """Return a row per seed of the whole training runs under a folder."""
    for path in sorted(folder.rglob("run.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        training = found["training"]
        for row in found["rows"]:
            yield (
                f"{training['recipe']} on {training['data']}",
                str(row["seed"]),
                f"{row['speedup']:.2f}",
                f"{row['work_left']:.3f}",
                f"{row['eta_run']:.2f}",
                f"{100 * row['losses']:.2f} %",
                f"`{found['command']}`",
            )


def recipe_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """Return a row per seed of the runs of `l0kernels train` under a folder."""
    for path in sorted(folder.rglob("summary.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["settings"]
        lam = ",".join(f"{lam:g}" for lam in settings["lam"])
        options = f"--data DIR{named(found['recipe'], settings)}"
        options += f" --epochs {settings['epochs']} --lam {lam}"
        if settings["rounds"]:
            options += f" --rounds {settings['rounds']}"
        for seed in found["seeds"]:
            for arm in seed["arms"].values():
                yield (
                    f"{found['recipe']} on {found['data']}",
                    schedule(found["recipe"], settings),
                    lam,
                    str(seed["seed"]),
                    f"{100 - arm['accuracy']:.2f} %",
                    f"{100 * arm['left_test']:.1f} %",
                    arm["open_units"],
                    "; ".join(map(published, found["published"])),
                    f"`l0kernels train {found['recipe']} {options} --seed {seed['seed']}`",
                )


def named(recipe: str, settings: dict[str, Any]) -> str:
    """Return the option that chooses the settings of a run, "" for the recipe's first ones.

    Raises:
        ValueError: a run with other settings than any of the recipe's.
    """
    kept = {key: value for key, value in settings.items() if key not in IN_THE_ROW}
    for name, found in RECIPES[recipe].named.items():
        if kept.items() <= found.settings.to_dict().items():
            return "" if name == RECIPES[recipe].default else f" --settings {name}"
    raise ValueError(f"{recipe}: expected settings of {list(RECIPES[recipe].named)}, got {kept}")


def schedule(recipe: str, settings: dict[str, Any]) -> str:
    """Return how many epochs, and rounds, a run had of those of the recipe's first settings."""
    whole = next(iter(RECIPES[recipe].named.values())).settings
    epochs = f"{settings['epochs']} of {whole.epochs}"
    if not settings["rounds"]:
        return epochs
    return f"{epochs} in each of {settings['rounds']} + 1 of {whole.rounds} + 1 rounds"


def published(figures: dict[str, Any]) -> str:
    """Return what a paper gives, in a few words."""
    accuracy, left = figures["accuracy"], figures["left"]
    known = (
        accuracy and f"{100 - accuracy:.1f} %",
        left and f"{left:g} % left",
        figures["units"],
    )
    cells = ", ".join(cell for cell in known if cell)
    doubt = "" if figures["confirmed"] else " (not confirmed)"
    return f"{figures['what']}: {cells}{doubt}"


def memory_rows(sheet: Sheet) -> Iterator[tuple[str, ...]]:
    """Return a row per arm."""
    for figure, ratio in peaks_of(sheet):
        cells = (f"{figure.open:g}", shown(figure.peak_mb, ".0f"), shown(ratio, ".2f"))
        yield figure.shape, figure.impl, *cells, f"`{sheet.command}`"


def places(found: Sequence[Sheet]) -> list[str]:
    """Return where the commands ran, a line for each."""
    lines = []
    for sheet in found:
        where = sheet.environment
        allocator = where.get("allocator")
        lines.append(
            f"`{sheet.command}`: {where['device']} ({where['cpu']}), {where['threads']} threads, "
            f"torch {where['torch']}, commit {where['git']}, "
            f"OMP_WAIT_POLICY={where['OMP_WAIT_POLICY']}, "
            f"{f'{allocator}, ' if allocator else ''}load average {where['load_average']} "
            f"before, {where['load_average_after']} after"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Put the tables into a file, or print them."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.readme", description=__doc__)
    parser.add_argument("results", type=Path, help="folder with CSV files of the benchmarks")
    parser.add_argument("--readme", type=Path, help="file with the markers of the tables")
    options = parser.parse_args(arguments)
    text = tables(options.results)
    if options.readme is None:
        print(text)
        return
    old = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(put_between(old, text, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
