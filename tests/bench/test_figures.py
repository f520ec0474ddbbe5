# SPDX-License-Identifier: Apache-2.0
"""README's tables say what the files say; memory and other revisions are measured apart."""

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from l0kernels.bench import base, memory, readme, timing
from l0kernels.bench.figures import Figure, Sheet, compare, put_between, slower, timed
from l0kernels.cli import main

ROOT = Path(__file__).resolve().parents[2]
WHERE = dict.fromkeys(("device", "cpu", "threads", "torch", "git", "OMP_WAIT_POLICY"), "?")


def step(impl: str, ms: float, keep: float = 0.5) -> Figure:
    return Figure("step", "step", impl, "f32", "lenet5 batch 4", keep, p50_ms=ms)


def test_of_three_runs_the_middle_one_counts():
    runs = [
        {"ours": [1.0, 1.0, 1.0], "plain": [4.0, 4.0, 5.0]},
        {"ours": [9.0, 9.0, 9.0], "plain": [9.0, 9.0, 9.0]},
        {"ours": [2.0, 3.0, 4.0], "plain": [6.0, 6.0, 6.0]},
    ]
    found = timed(runs, "ours", "ours")
    assert found["medians_ms"] == (1.0, 9.0, 3.0)
    assert (found["p20_ms"], found["p50_ms"], found["p80_ms"]) == pytest.approx((2.4, 3.0, 3.6))
    # Medians of the ratios are 4, 1 and 2.
    assert timed(runs, "plain", "ours")["over_ours"] == timing.paired(runs[2], "plain", "ours")
    assert timed(runs, "plain", None)["over_ours"] is None
    assert [timing.middle(v) for v in ([5.0], [2.0, 1.0], [3.0, 1.0, 2.0])] == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one value"):
        timing.middle([])


def test_only_the_same_problems_are_compared():
    old = Sheet("", {}, [step("ours", 2.0), step("dense", 1.0)])
    new = Sheet("", {}, [step("ours", 3.0), step("dense", 9.0), step("ours", 1.0, keep=0.1)])
    changes = compare(old, new)
    assert [(c.new.impl, c.old_ms, c.ratio) for c in changes] == [
        ("ours", 2.0, 1.5),
        ("dense", 1.0, 9.0),
    ]
    assert [c.new.impl for c in slower(changes, 0.4)] == ["ours"]
    assert slower(changes, 0.5) == []
    with pytest.raises(ValueError, match="got none in common"):
        compare(old, Sheet("", {}, [step("ours", 1.0, keep=0.1)]))


def test_readme_tables_have_commands_and_losses(tmp_path: Path):
    figures = [step("ours", 4.0), step("masked-best", 8.0), step("dense", 2.0), step("oracle", 3.0)]
    operator = Figure("pack_weight", "forward", "cpp", "f32", "500x800:both", 0.5, p50_ms=1.0)
    figures += [operator, replace(operator, impl="plain", p50_ms=3.0)]
    operator = replace(operator, open=0.1, p50_ms=3.0)
    figures += [operator, replace(operator, impl="plain", p50_ms=1.5)]
    peak = Figure("memory", "step", "ours", "f32", "lenet5 batch 4", 0.5, peak_mb=72.0)
    figures += [peak, replace(peak, impl="masked-best", peak_mb=100.0)]
    sheet = Sheet("l0kernels bench step --model lenet5", WHERE, figures)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "step.csv").write_text(sheet.to_csv())
    (tmp_path / "other.csv").write_text("model,batch\nlenet5,4\n")
    (tmp_path / "empty.csv").write_text("")
    row = {"seed": 3, "speedup": 1.5, "work_left": 0.5, "eta_run": 0.75, "losses": 0.002}
    training = {"recipe": "lenet5-hc", "data": "digits"}
    run = {"command": "l0kernels bench run lenet5-hc", "rows": [row], "training": training}
    (tmp_path / "deep" / "run.json").write_text(json.dumps(run))
    text = readme.tables(tmp_path)
    command = "`l0kernels bench step --model lenet5`"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        f"| lenet5 batch 4 | f32 | 0.5 | 4 |  | 2.00 | 0.50 | 0.75 |  |  | dense, oracle |"
        f" {command} |" in lines
    )
    assert (
        "| pack_weight, cpp | forward | 500x800:both | f32 | 0.5 / 0.1 | 1 / 3 | 3.00 / 0.50"
        f" |  /  |  /  | plain at 0.1 | {command} |" in lines
    )
    assert f"| lenet5 batch 4 | ours | 0.5 | 72 | 0.72 | {command} |" in lines
    assert f"- {command}: ?" in text
    run = "`l0kernels bench run lenet5-hc`"
    assert f"| lenet5-hc on digits | 3 | 1.50 | 0.500 | 0.75 | 0.20 % | {run} |" in lines

    page = tmp_path / "README.md"
    page.write_text(f"a\n{readme.BEGIN}old\n{readme.END}b\n")
    readme.main([str(tmp_path), "--readme", str(page)])
    once = page.read_text()
    assert once == f"a\n{readme.BEGIN}\n{text}\n{readme.END}b\n"
    readme.main([str(tmp_path), "--readme", str(page)])
    assert page.read_text() == once
    (tmp_path / "none").mkdir()
    assert readme.tables(tmp_path / "none") == readme.NOTHING
    with pytest.raises(ValueError, match="once each"):
        put_between("no markers", "new", readme.BEGIN, readme.END)


def test_steps_with_nearly_all_open_are_listed(tmp_path: Path):
    def row(keep: float, *masked: float) -> dict:
        ours = [1.0] * len(masked)
        return {"keep": keep, "times": [{"masked-best": list(masked), "ours": ours}]}

    rows = [row(1, 0.9, 0.9, 0.9), row(0.95, 0.9, 0.97, 1.1), row(0.9, 1.2, 1.2), row(0.5, 2.0)]
    report = {
        "setting": {"model": "net", "batch": 3},
        "variants": ["masked-best", "ours"],
        "rows": rows,
    }
    (tmp_path / "step.json").write_text(json.dumps(report))
    found = list(readme.nearly_open_rows(tmp_path))
    assert found == [
        ("net batch 3", "1", "0.900", "0.900 - 0.900", "yes"),
        ("net batch 3", "0.95", "0.970", "0.900 - 1.100", "no"),
        ("net batch 3", "0.9", "1.200", "1.200 - 1.200", "no"),
    ]
    (tmp_path / "step.json").write_text(json.dumps({**report, "variants": ["ours"]}))
    assert not list(readme.nearly_open_rows(tmp_path))


def test_recipes_stand_beside_the_published_figures(tmp_path: Path):
    published = {"what": "lam", "accuracy": 99.0, "left": 1.5, "units": "5-9", "confirmed": False}
    seed = {
        "seed": 3,
        "arms": {"packed": {"accuracy": 98.5, "left_test": 0.021, "open_units": "4-8"}},
    }
    found = {
        "recipe": "lenet5-hc",
        "data": "mnist",
        "settings": {"epochs": 7, "lam": [10.0, 0.5], "rounds": 0},
        "seeds": [seed],
        "published": [published, {**published, "left": None, "confirmed": True}],
    }
    (tmp_path / "summary.json").write_text(json.dumps(found))
    (row,) = readme.recipe_rows(tmp_path)
    assert row[:4] == ("lenet5-hc on mnist", "7 of 200", "10,0.5", "3")
    assert row[4:7] == ("1.50 %", "2.1 %", "4-8")
    assert row[7] == "lam: 1.0 %, 1.5 % left, 5-9 (not confirmed); lam: 1.0 %, 5-9"
    command = "l0kernels train lenet5-hc --data DIR --epochs 7 --lam 10,0.5 --seed 3"
    assert row[8] == f"`{command}`"
    assert command in readme.tables(tmp_path)
    averaged = {**found["settings"], "ema": 0.999}
    (tmp_path / "summary.json").write_text(json.dumps({**found, "settings": averaged}))
    (row,) = readme.recipe_rows(tmp_path)
    assert "--data DIR --settings averaged --epochs 7" in row[8]
    unknown = {**averaged, "ema": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps({**found, "settings": unknown}))
    with pytest.raises(ValueError, match="expected settings of .*averaged.*got .*0.5"):
        list(readme.recipe_rows(tmp_path))
    rounds = {"epochs": 20, "lam": [1e-8], "rounds": 1}
    ticket = {**published, "what": "ticket", "accuracy": None, "left": 12.3, "units": ""}
    ticket["confirmed"] = True
    (tmp_path / "summary.json").write_text(
        json.dumps({**found, "recipe": "resnet20-cs", "settings": rounds, "published": [ticket]})
    )
    (row,) = readme.recipe_rows(tmp_path)
    assert row[1] == "20 of 85 in each of 1 + 1 of 3 + 1 rounds"
    assert row[7] == "ticket: 12.3 % left"
    assert "--epochs 20 --lam 1e-08 --rounds 1 --seed 3" in row[8]


def test_figures_in_the_readme_are_those_that_were_recorded():
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("bench/results is not part of a source distribution")
    text = (ROOT / "README.md").read_text()
    table = readme.tables(ROOT / "bench" / "results")
    assert put_between(text, table, readme.BEGIN, readme.END) == text


def recorded_rows(name: str) -> list[dict]:
    """Rows of a file of bench/results that README's tables by hand quote."""
    path = ROOT / "bench" / "results" / name
    if not path.exists():
        pytest.skip("bench/results is not part of a source distribution")
    return json.loads(path.read_text())["rows"]


def in_the_readme(*cells: str) -> bool:
    """Whether README has a row of a table that begins with these cells."""
    row = f"| {' | '.join(cells)} |"
    return any(line.startswith(row) for line in (ROOT / "README.md").read_text().splitlines())


def test_predictions_in_the_readme_are_those_of_the_file():
    rows = [row for row in recorded_rows("cost.json") if row["device"] == "h200"]
    for keep in (1.0, 0.5, 0.25, 0.1):
        of = {row["variant"]: row for row in rows if row["keep"] == keep}
        ours = of["ours"]
        busy = [sum(w["ms"] for w in of[v]["works"]) for v in ("masked-best", "oracle", "ours")]
        eager = max(busy[-1], ours["host_ms"])
        launches = sum(work["launches"] for work in ours["works"])
        cells = (f"{keep:g}".lstrip("0"), *(f"{ms:.1f}" for ms in busy), str(launches))
        assert in_the_readme(*cells, f"{eager:.1f} / {ours['measured_ms']:.1f}"), cells


@pytest.mark.parametrize(
    ("gates", "told"),
    [
        ("lenet5-hc", "LeNet-5, L0-HC, recorded"),
        ("lenet5-arm", "LeNet-5, L0-ARM, recorded"),
        ("wrn-28-10 of lenet5-hc's gates", "groups of WRN-28-10, gates of the first"),
        ("wrn-28-10 of lenet5-arm's gates", "groups of WRN-28-10, gates of the second"),
    ],
)
def test_capacities_in_the_readme_are_those_of_the_file(gates: str, told: str):
    rows = recorded_rows("capacity.json")
    policy = (gates, 100, 4.0)
    (row,) = (row for row in rows if (row["gates"], row["every"], row["sigmas"]) == policy)
    ratios = (f"{row['width']:.2f}", f"{row['work']:.2f}", f"{row['saved']:.3f}".lstrip("0"))
    assert in_the_readme(told, f"{row['overflow']:.0e}", *ratios), row


def test_memory_of_each_arm_in_its_own_process(tmp_path: Path):
    if memory.resident("VmHWM") is None:
        pytest.skip("the system has no /proc/self/status")
    words = ["--model", "mlp-784-300-100", "--batch", "4", "--variants", "masked-best,ours"]
    assert main(["bench", "memory", *words, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "memory.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["impl"] for line in lines] == ["masked-best", "ours"]
    for line in lines:
        assert 50 < float(line["peak_mb"]) < 5000  # Python and torch alone need that
        assert float(line["error"]) < 1e-5 and not line["p50_ms"]
        assert line["command"].startswith("l0kernels bench memory --model mlp-784-300-100")
    found = json.loads((tmp_path / "memory.json").read_text())
    assert [row["impl"] for row in found["rows"]] == ["masked-best", "ours"]
    assert "/ masked-best" in (tmp_path / "memory.md").read_text()


def test_a_larger_batch_needs_more_memory():
    if memory.resident("VmHWM") is None:
        pytest.skip("the system has no /proc/self/status")
    small, large = (
        memory.measure(memory.Setting("lenet5", batch, variants=("dense",))).figures[0].peak_mb
        for batch in (4, 1024)
    )
    # Outputs of two convolutions with their gradients, 20 x 24 x 24 and 50 x 8 x 8 floats each.
    least = 2 * 4 * 1024 * (20 * 24 * 24 + 50 * 8 * 8) / 1e6
    assert small is not None and large is not None and large - small > least


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "alexnet"], "expected one of mlp-784-300-100"),
        (["--variants", "sparse"], "expected variants among dense"),
        (["--keep", "2"], "expected open fractions in (0, 1], got [2.0]"),
        (["--batch", "0"], "expected batch >= 1, got 0"),
    ],
)
def test_bad_input_of_memory(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "memory", *options]) == 2
    assert told in capsys.readouterr().err


BASE = ["bench", "ops", "--only", "sample_gates", "--shapes", "3x20", "--keep", ".5", "--rounds"]
BASE += ["1", "--runs", "1", "--warmup", "0"]


def test_another_revision_is_built_and_run_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """A repository made here: the working tree as its only commit, without compiled libraries."""
    if timing.checkout() is None:
        pytest.skip("the package is not in a git checkout")
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "l0kernels", "bench/*.py", "setup.py", "README.md"]
        + ["pyproject.toml", "LICENSE", "MANIFEST.in"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.split():
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    git = ["git", "-C", str(tree), "-c", "user.name=test", "-c", "user.email=test"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(base, "checkout", lambda: tree)
    monkeypatch.setattr(base, "what_is_built", lambda: "none")
    assert main([*BASE, "--base", "HEAD"]) == 0
    out = capsys.readouterr().out
    assert "| sample_gates | forward | reference | f32 | 3x20 | 0.5 |" in out.split("new / old")[1]
    worktrees = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1
    assert main([*BASE, "--base", "nonsense"]) == 2
    assert "git knows no 'nonsense'" in capsys.readouterr().err


def test_no_other_revision_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(base, "checkout", lambda: None)
    assert main([*BASE, "--base", "HEAD"]) == 2
    assert "expected a git checkout for --base" in capsys.readouterr().err
