# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench step` writes complete, consistent output and refuses bad input."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph.recorder import TapeRecorder

from l0kernels.bench import arms, models, peers, step
from l0kernels.bench import cli as bench_cli
from l0kernels.bench.figures import Sheet
from l0kernels.bench.plot import STYLES
from l0kernels.bench.timing import Spread, middle, paired, spread
from l0kernels.cli import main
from l0kernels.nn import matmul

QUICK = ["bench", "step", "--model", "lenet5", "--batch", "4", "--rounds", "2", "--warmup", "1"]
QUICK += ["--runs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "made" / "here"
    assert main([*QUICK, "--runs", "3", "--keep", "1,.25", "--out", str(out)]) == 0
    return out


def test_writes_every_file_and_nothing_else(finished: Path):
    names = ["step.csv", "step.json", "step.md", "step.png"]
    assert sorted(path.name for path in finished.iterdir()) == names
    assert (finished / "step.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_ours_with_open_rows(tmp_path: Path):
    """LeNet-5's first linear layer has 400,000 weights."""
    what = [*QUICK, "--keep", ".25", "--variants", "masked-best,ours,oracle"]
    assert main([*what, "--optimizer", "open-rows", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert "--optimizer open-rows" in report["command"]
    assert report["rows"][0]["error_after"]["ours"] <= 1e-12


def test_graph_mode_without_a_gpu_is_a_dry_run(tmp_path: Path):
    what = [*QUICK, "--keep", ".5", "--variants", "dense,index-select,masked-best,oracle,ours"]
    assert main([*what, "--mode", "graph", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert "--mode graph" in report["command"]
    assert report["variants"] == ["dense", "masked-best", "oracle", "ours"]
    left_out, dry = report["notes"]
    assert "index-select is left out" in left_out and "a dry run" in dry
    assert report["rows"][0]["error_after"]["ours"] <= 1e-12
    assert "replayed from graphs" in (tmp_path / "step.md").read_text()


@pytest.mark.parametrize("variant", ["dense", "masked-best", "ours"])
def test_captured_steps_are_those_that_are_launched(variant: str, monkeypatch: pytest.MonkeyPatch):
    task = arms.Task(models.network("lenet5"), 4, torch.device("cpu"))
    eager = arms.make_arm(task, variant, 0.5)
    monkeypatch.setattr("l0kernels._capture.recorder_for", lambda device: TapeRecorder())
    captured = arms.make_arm(replace(task, graph=True), variant, 0.5)
    torch.manual_seed(0)
    captured.capture()
    for _ in range(4):
        captured.step()
    # Making state, warming up and replays are steps, too.
    steps = 4 + (3 if variant == "ours" else 2)
    torch.manual_seed(0)
    for _ in range(steps):
        eager.step()
    if isinstance(captured, arms.GraphArm) and captured.captured is not None:
        captured.captured.flush()
    for (name, got), expected in zip(captured.named.items(), eager.named.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("variant", ["dense", "masked-best"])
def test_no_graph_of_an_earlier_step_is_alive_in_a_captured_one(variant: str):
    """Its nodes that accumulate gradients belong to the stream of that step."""
    task = arms.Task(models.network("lenet5"), 4, torch.device("cpu"), graph=True)
    arm = arms.make_arm(task, variant, 0.5)
    loss, begun = arm.loss, []

    def watched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nodes = [p.view_as(p).grad_fn.next_functions[0][0] for p in arm.trained]
        begun.append(any("step" in node.metadata for node in nodes))
        for node in nodes:
            node.metadata["step"] = len(begun)
        return loss(x, y)

    arm.loss = watched
    for _ in range(3):
        arm.eager_step()
    assert begun == [False] * 3


def test_json_is_complete(finished: Path):
    report = json.loads((finished / "step.json").read_text())
    assert report["setting"]["model"] == "lenet5"
    assert report["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert len(report["environment"]["load_average_after"]) == 3
    assert "gate draw + penalty + forward + backward + optimizer" in report["step"]
    assert [row["keep"] for row in report["rows"]] == [1.0, 0.25]
    for row in report["rows"]:
        assert len(row["times"]) == 3
        for times in row["times"]:
            assert list(times) == list(arms.VARIANTS)
            assert all(len(ms) == 2 and min(ms) > 0 for ms in times.values())
        there = {n: ends for n, ends in step.RATIOS.items() if set(ends) <= set(arms.VARIANTS)}
        assert set(row["ratios"]) == set(there)
        for name, (over, under) in there.items():
            ratios = [paired(times, over, under) for times in row["times"]]
            medians = [ratio.median for ratio in ratios]
            assert row["medians"][name] == medians
            assert Spread(**row["ratios"][name]) == ratios[middle(medians)]
            assert sorted(medians)[1] == row["ratios"][name]["median"]
        assert set(row["error_before"]) == {"masked-nchw", "index-select", "ours"}
        assert max(row["error_before"].values()) <= arms.TOLERANCE
        assert set(row["error_after"]) == set(arms.VARIANTS)
        for name, error in row["error_after"].items():
            assert error <= (1e-5 if name in arms.IN_SINGLE else 1e-12)


def test_csv_has_one_line_per_figure(finished: Path):
    with (finished / "step.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["impl"] for line in lines] == [*arms.VARIANTS, *arms.VARIANTS]
    report = json.loads((finished / "step.json").read_text())
    for line in lines:
        row = next(r for r in report["rows"] if r["keep"] == float(line["open"]))
        medians = [spread(times[line["impl"]]).median for times in row["times"]]
        assert [float(ms) for ms in line["medians_ms"].split()] == pytest.approx(medians, rel=1e-4)
        assert float(line["p50_ms"]) == pytest.approx(sorted(medians)[1], rel=1e-4)
        over_ours = [paired(times, line["impl"], "ours").median for times in row["times"]]
        assert float(line["over_ours"].split()[0]) == pytest.approx(sorted(over_ours)[1], rel=1e-3)
        assert line["torch"] == report["environment"]["torch"]
        assert line["command"] == report["command"]
        assert (line["op"], line["shape"]) == ("step", "lenet5 batch 4")
    words = "--model lenet5 --batch 4 --keep 1,0.25 --rounds 2 --warmup 1"
    assert lines[0]["command"] == f"l0kernels bench step {words}"


def test_the_printed_command_repeats_the_run(finished: Path):
    words = Sheet.load(finished / "step.csv").command.split()[1:]
    parser = bench_cli.argparse.ArgumentParser()
    bench_cli.add_arguments(parser)
    args = parser.parse_args(words[1:])
    setting = bench_cli.setting_of(step.Setting, args)
    report = json.loads((finished / "step.json").read_text())
    assert json.loads(json.dumps(vars(setting))) == report["setting"]


def test_table_has_a_line_per_open_fraction(finished: Path):
    text = (finished / "step.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == ["open", "---:", "1", "0.25"]
    there = [ends for ends in step.RATIOS.values() if set(ends) <= set(arms.VARIANTS)]
    assert {len(row) for row in rows} == {2 + len(arms.VARIANTS) + len(there)}
    report = json.loads((finished / "step.json").read_text())
    assert [int(row[1]) for row in rows[2:]] == [row["steps"] for row in report["rows"]]
    assert "OMP_WAIT_POLICY=passive" in text
    assert "optimizer" in text and "agree with the masked network" in text


def test_chosen_variants_as_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chosen = ["--keep", ".5", "--variants", "index-select,oracle", "--json"]
    picture = tmp_path / "ratios.png"
    assert main([*QUICK, *chosen, "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    row = report["rows"][0]
    (times,) = row["times"]
    assert list(times) == ["index-select", "oracle"]
    assert set(row["error_after"]) == {"index-select", "oracle"}
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
        ("dense,ours,oracle-onednn,oracle", ["oracle", "oracle-onednn"]),
        ("ours,masked-best", []),
    ):
        assert main([*QUICK, "--keep", ".5", "--variants", variants]) == 0
        assert rounds.pop() == (variants.split(","), last)


@pytest.mark.parametrize("variant", [name for name in arms.VARIANTS if name not in arms.REBUILT])
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
        (["--variants", "ours,sparse"], "expected variants among dense, masked-nchw"),
        (["--variants", ","], "got none"),
        (["--keep", "0"], "expected open fractions in (0, 1], got [0.0]"),
        (["--keep", "1,2"], "expected open fractions in (0, 1]"),
        (["--batch", "0"], "expected batch >= 1"),
        (["--rounds", "0"], "rounds >= 1"),
        (["--runs", "0"], "runs >= 1"),
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


def test_peers_run_or_say_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    chosen = [*QUICK, "--keep", ".25", "--variants", "torch-prune,torch-pruning"]
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert main([*chosen, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["variants"] == ["torch-prune"]
    assert report["notes"] == ["torch-pruning is left out: torch-pruning is not installed"]
    assert main([*chosen[:-1], "torch-pruning"]) == 2
    assert "torch-pruning is not installed" in capsys.readouterr().err


def test_wrong_weights_of_an_ungated_variant_have_no_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    product = matmul._product
    monkeypatch.setattr(matmul, "_product", lambda *args: product(*args) * 1.1)
    assert main([*QUICK, "--keep", ".5", "--variants", "oracle-onednn"]) == 2
    captured = capsys.readouterr()
    assert "of its twin, got {'oracle-onednn'" in captured.err
    assert captured.out == ""
