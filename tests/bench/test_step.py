# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench step` writes complete, consistent output and refuses bad input."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from l0kernels.bench import arms, models, step
from l0kernels.bench.plot import STYLES
from l0kernels.bench.timing import Spread, spread
from l0kernels.cli import main

QUICK = ["bench", "step", "--model", "lenet5", "--batch", "4", "--rounds", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "made" / "here"
    assert main([*QUICK, "--keep", "1,.25", "--out", str(out)]) == 0
    return out


def test_writes_every_file_and_nothing_else(finished: Path):
    names = ["step.csv", "step.json", "step.md", "step.png"]
    assert sorted(path.name for path in finished.iterdir()) == names
    assert (finished / "step.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_json_is_complete(finished: Path):
    report = json.loads((finished / "step.json").read_text())
    assert report["setting"]["model"] == "lenet5"
    assert report["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert len(report["environment"]["load_average_after"]) == 3
    assert "gate draw + penalty + forward + backward + optimizer" in report["step"]
    assert [row["keep"] for row in report["rows"]] == [1.0, 0.25]
    for row in report["rows"]:
        assert list(row["times"]) == list(arms.VARIANTS)
        assert all(len(ms) == 2 and min(ms) > 0 for ms in row["times"].values())
        assert set(row["ratios"]) == set(step.RATIOS)
        for name, (over, under) in step.RATIOS.items():
            pairs = zip(row["times"][over], row["times"][under], strict=True)
            expected = spread([a / b for a, b in pairs])
            assert Spread(**row["ratios"][name]) == expected
        for errors in (row["error_before"], row["error_after"]):
            assert set(errors) == {"masked-nchw", "index-select", "ours"}
            assert max(errors.values()) <= arms.TOLERANCE


def test_csv_has_one_line_per_time(finished: Path):
    with (finished / "step.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(arms.VARIANTS) * 2
    report = json.loads((finished / "step.json").read_text())
    for line in lines:
        row = next(r for r in report["rows"] if r["keep"] == float(line["open"]))
        ms = row["times"][line["variant"]][int(line["round"])]
        assert float(line["ms"]) == pytest.approx(ms, abs=1e-3)
        assert line["torch"] == report["environment"]["torch"]


def test_table_has_a_line_per_open_fraction(finished: Path):
    text = (finished / "step.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == ["open", "---:", "1", "0.25"]
    assert {len(row) for row in rows} == {1 + len(arms.VARIANTS) + len(step.RATIOS)}
    assert "OMP_WAIT_POLICY=passive" in text
    assert "optimizer" in text and "agree with the masked network" in text


def test_chosen_variants_as_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chosen = ["--keep", ".5", "--variants", "index-select,oracle", "--json"]
    picture = tmp_path / "ratios.png"
    assert main([*QUICK, *chosen, "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    row = report["rows"][0]
    assert list(row["times"]) == ["index-select", "oracle"]
    assert list(row["ratios"]) == ["index-select / oracle"]
    assert row["error_before"] == {}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_oracles_end_the_round_after_ours(monkeypatch: pytest.MonkeyPatch):
    rounds: list[tuple[list[str], list[str]]] = []
    interleave = step.interleave

    def told(steps: dict, *rest: Any) -> dict:
        rounds.append((list(steps), list(rest[-1])))
        return interleave(steps, *rest)

    monkeypatch.setattr(step, "interleave", told)
    for variants, last in (
        ("oracle-rounded,oracle,ours", ["oracle", "oracle-rounded"]),
        ("ours,masked-best", []),
    ):
        assert main([*QUICK, "--keep", ".5", "--variants", variants]) == 0
        assert rounds.pop() == (variants.split(","), last)


@pytest.mark.parametrize("variant", [name for name in arms.VARIANTS if name != "oracle"])
def test_steps_run_under_autocast(variant: str):
    network = models.network("mlp-784-300-100")
    task = arms.Task(network, 2, torch.device("cpu"), amp=torch.bfloat16)
    arm = arms.make_arm(task, variant, 0.5)
    dtypes: list[torch.dtype] = []
    arm.net.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    arm.step()
    assert dtypes == [torch.bfloat16]


def test_rebuilding_the_oracle_leaves_the_generators_alone():
    oracle = arms.Oracle(arms.Task(models.network("mlp-784-300-100"), 2, torch.device("cpu")), 0.5)
    before = torch.get_rng_state()
    oracle.rebuild()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_ratio_has_its_own_look():
    assert set(STYLES) == set(step.RATIOS)
    assert len({colour for colour, _ in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "alexnet"], "expected one of mlp-784-300-100"),
        (["--variants", "ours,dense"], "expected variants among masked-nchw"),
        (["--variants", ","], "got none"),
        (["--keep", "0"], "expected open fractions in (0, 1], got [0.0]"),
        (["--keep", "1,2"], "expected open fractions in (0, 1]"),
        (["--batch", "0"], "expected batch >= 1"),
        (["--rounds", "0"], "rounds >= 1"),
        (["--threads", "0"], "expected --threads >= 1, got 0"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_input(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main([*QUICK, *options]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


def test_keep_that_is_no_list_of_numbers(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([*QUICK, "--keep", "half"])
    assert "expected numbers like 1,.5,.1, got 'half'" in capsys.readouterr().err


def test_refuses_spinning_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main([*QUICK, "--out", str(tmp_path / "out")]) == 2
    assert "expected OMP_WAIT_POLICY=passive" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_figures_when_variants_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(arms, "disagreement", lambda *_: {"ours": float("nan")})
    assert main([*QUICK, "--keep", ".5"]) == 2
    captured = capsys.readouterr()
    assert "no figures for different computations" in captured.err
    assert captured.out == ""
