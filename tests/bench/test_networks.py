# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench networks` fills its table, shows what fails, and compares what it says."""

import copy
import csv
import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import l0kernels as l0
from l0kernels.bench import convert_cost, networks, oracle, zoo, zoo_arms
from l0kernels.bench.timing import Spread, spread
from l0kernels.cli import main
from l0kernels.training import gates_of

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

QUICK = ["bench", "networks", "--quick", "--threads", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "made"
    threads = torch.get_num_threads()  # a module's fixture runs before those that put it back
    assert main([*QUICK, "--only", "signal,two-by-two", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out


def test_writes_every_file_and_nothing_else(finished: Path):
    names = ["networks.csv", "networks.json", "networks.md"]
    assert sorted(path.name for path in finished.iterdir()) == names


def test_json_is_complete(finished: Path):
    report = json.loads((finished / "networks.json").read_text())
    assert report["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert report["setting"]["size"] == "small"
    assert [row["name"] for row in report["rows"]] == ["signal", "two-by-two"]
    assert [row["groups"] for row in report["rows"]] == [5, 5]
    for row in report["rows"]:
        assert (row.pop("error"), row.pop("skipped")) == (None, None)
        if not Path("/proc/self/status").exists():
            for name in ("convert_mb", "convert_memory", "convert_memory_fp64"):
                assert row.pop(name) is None
        formats = {row.pop("masked_format"), row.pop("oracle_format")}
        assert formats <= ({None} if row["name"] == "signal" else {"NCHW", "NHWC"})
        assert [name for name, value in row.items() if value is None] == []
        assert max(row["packed_error"], row["compact_error"]) <= 1e-9
        assert row["equal_predictions"] == row["positions"] == networks.QUICK.inputs
        assert row["examples"] * (2 if row["name"] == "two-by-two" else 1) == row["positions"]
        assert sum(row["stages"].values()) <= row["elapsed"]
        assert row["onnx_error"] <= 1e-4
        assert list(row["times"]) == ["masked", "ours", "oracle"]
        pairs = zip(row["times"]["masked"], row["times"]["ours"], strict=True)
        assert Spread(**row["speedup"]) == spread([a / b for a, b in pairs])
        pairs = zip(row["times"]["ours"], row["times"]["oracle"], strict=True)
        assert Spread(**row["oracle_ratio"]) == spread([a / b for a, b in pairs])


def test_csv_has_one_line_per_network_and_the_environment(finished: Path):
    with (finished / "networks.csv").open() as file:
        lines = list(csv.DictReader(file))
    report = json.loads((finished / "networks.json").read_text())
    assert [line["name"] for line in lines] == ["signal", "two-by-two"]
    for line, row in zip(lines, report["rows"], strict=True):
        assert float(line["packed_error"]) == row["packed_error"]
        assert float(line["speedup_low"]) == row["speedup"]["low"]
        assert line["torch"] == report["environment"]["torch"]
        assert line["error"] == ""


def test_table_has_a_full_line_per_network(finished: Path):
    text = (finished / "networks.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == ["network", "---", "signal", "two-by-two"]
    assert [cell.strip() for cell in rows[0]] == list(networks.COLUMNS)
    assert all(len(row) == len(networks.COLUMNS) for row in rows)
    assert "OMP_WAIT_POLICY=passive" in text and networks.CONTENT in text


def test_a_run_that_is_cut_off_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def once(entry: zoo.Entry, setting: networks.Setting, bar: object) -> networks.Row:
        if entry.name == "lenet5":
            raise KeyboardInterrupt
        return networks.Row(entry.name, entry.batch)

    monkeypatch.setattr(networks, "measure_row", once)
    only = "mlp,signal,lenet5,unet"
    assert main([*QUICK, "--only", only, "--out", str(tmp_path)]) == 130
    rows = json.loads((tmp_path / "networks.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["mlp", "signal"]


class Silent(nn.Module):
    """A network with nothing to gate."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


def test_a_failing_network_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    bad = replace(zoo.entry("reused"), name="silent", make=lambda size: Silent())
    absent = replace(bad, name="absent", needs="no_such_package")
    chosen = (bad, absent, zoo.entry("reused"))
    monkeypatch.setattr(zoo, "entries", lambda: chosen)
    # Another process would not know these networks.
    monkeypatch.setattr(networks, "growth_elsewhere", convert_cost.growth)
    assert main([*QUICK, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "failed: silent" in captured.err
    assert "reused: " in captured.err  # and its seconds
    assert "- silent failed: convert: ValueError: convert: nothing can be gated" in captured.out
    assert "- absent skipped: no_such_package is not installed" in captured.out
    rows = json.loads((tmp_path / "networks.json").read_text())["rows"]
    assert [row["packed_error"] is None for row in rows] == [True, True, False]
    assert rows[0]["parameters"] == 39


def test_a_network_with_other_groups_than_expected_fails(monkeypatch: pytest.MonkeyPatch):
    other = replace(zoo.entry("reused"), gated=lambda _: [zoo.Gated(("first",), ("last",))])
    other = replace(other, refused={"*": "."})
    monkeypatch.setattr(networks, "growth_elsewhere", lambda *_: None)
    row = networks.Row(other.name, other.batch)
    with pytest.raises(RuntimeError, match="in one only: .*first.*last.*classifier"):
        networks.Subject(other, networks.QUICK, row).convert()


@pytest.mark.parametrize("error", [2e-9, float("nan")])
def test_figures_of_another_computation_fail(error: float):
    networks.require("packed and masked", 1e-9, 1e-9)
    with pytest.raises(RuntimeError, match="by at most 1e-09, got (2.0e-09|nan)"):
        networks.require("packed and masked", error, 1e-9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "alexnet"], "expected one of mlp, lenet5"),
        (["--draws", "0"], "expected draws >= 1, got 0"),
        (["--inputs", "0"], "expected inputs >= 1, got 0"),
        (["--rounds", "0"], "expected rounds >= 1, got 0"),
        (["--warmup", "-1"], "expected warmup >= 0, got -1"),
        (["--threads", "0"], "expected --threads >= 1, got 0"),
    ],
)
def test_bad_input(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main([*QUICK, *options]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


def test_convert_in_its_own_process_tells_its_error():
    with pytest.raises(RuntimeError, match="expected one of mlp, .*got 'alexnet'"):
        convert_cost.growth_elsewhere("alexnet", "small")


def test_memory_freed_before_convert_is_not_reused_unseen(monkeypatch: pytest.MonkeyPatch):
    if convert_cost.resident("VmHWM") is None or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("resident memory is read from Linux's /proc and trimmed by glibc")
    entry = zoo.entry("reused")
    used = 48 << 20

    def leave_a_heap(*_: object) -> nn.Module:
        # Blocks below every threshold: they come from the heap, which keeps them when freed, since
        # the last one stays in use above them.
        blocks = [torch.ones(1 << 13) for _ in range(used >> 15)]
        kept.append(blocks[-1])
        return entry.build("small")

    def fill_a_heap(net: nn.Module, _: object) -> nn.Module:
        if sum(p.numel() for p in net.parameters()) > 200:  # not the tiny one
            made.extend(torch.ones(1 << 13) for _ in range(used >> 15))
        return net

    kept: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    monkeypatch.setattr(convert_cost, "settled", leave_a_heap)
    monkeypatch.setattr(convert_cost, "convert", fill_a_heap)
    grown = convert_cost.growth("reused", "small")
    assert grown is not None
    assert used * 0.9 <= grown <= used * 1.5


PEAK = """
import torch
from l0kernels.bench import resident
resident.reset_peak()
before = resident.resident("VmRSS")
peak = torch.ones(64 << 18)
del peak
print(resident.resident("VmHWM") - before)
"""


def test_resident_memory_sees_a_peak():
    """In a process of its own: what other tests leave in the heap would be used again."""
    if convert_cost.resident("VmHWM") is None:
        pytest.skip("the system has no /proc/self/status")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 60 << 20 <= int(done.stdout) <= 96 << 20


def test_bytes_needed_in_both_precisions():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), torch.randn(5, 8)
    numbers = 8 * 16 + 16 + 5 * 8 + 5 * 16
    assert convert_cost.bytes_needed(net, (x,), torch.float32) == 4 * numbers
    assert convert_cost.bytes_needed(net, (x,), torch.float64) == 8 * numbers
    assert next(net.parameters()).dtype == torch.float32


def test_bytes_of_state_and_activations():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh())
    assert convert_cost.bytes_of_state(net) == 4 * (8 * 16 + 16 + 16 * 4 + 4)
    # Saved: the input, the output of ReLU (once, though two layers need it), the output of tanh.
    assert convert_cost.bytes_of_activations(net, (torch.randn(5, 8),)) == 4 * 5 * (8 + 16 + 4)


@pytest.fixture
def twins() -> oracle.Twins:
    entry = zoo.entry("densenet40")
    plain, inputs = oracle.perturb(entry.build("small")), entry.example("small", 4)
    return oracle.twins(networks.convert(copy.deepcopy(plain), inputs), plain, inputs)


def test_what_rounding_alone_decides_is_undetermined(twins: oracle.Twins):
    exact = twins.to(torch.float64)
    z = oracle.gate_values(gates_of(exact.packed).sizes, 3)
    before = copy.deepcopy(exact.plain.state_dict())
    names = list(exact.run_masked(z))
    assert "output 0" in exact.undetermined(z, names, 0.0)
    assert not exact.undetermined(z, names, 1e-9)
    torch.testing.assert_close(exact.plain.state_dict(), before, atol=0.0, rtol=0.0)


def test_the_masked_arm_computes_what_ours_does(
    twins: oracle.Twins, monkeypatch: pytest.MonkeyPatch
):
    exact = twins.to(torch.float64)
    gates = gates_of(exact.packed)
    z = oracle.gate_values(gates.sizes, 7)  # most units open: every layer matters
    monkeypatch.setattr(zoo_arms, "hard_concrete", lambda *_: z)
    masked = zoo_arms.MaskedTraining(exact.plain, exact).double()
    with torch.no_grad():
        masked.log_alpha.copy_(gates.log_alpha)
    with gates.using(z):
        ours = exact.packed(*exact.inputs)
    assert torch.allclose(masked(*exact.inputs), ours, rtol=1e-10, atol=0)
    with torch.no_grad():
        penalties = float(masked.penalty()), float(l0.penalty(exact.packed))
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-6)


def test_the_oracle_has_the_widths_that_ours_drew(twins: oracle.Twins):
    entry = zoo.entry("densenet40")
    ours = zoo_arms.our_arm(entry, twins.packed, twins.inputs)
    rebuilt = zoo_arms.Oracle(entry, ours, twins.inputs, "NHWC")
    with pytest.raises(RuntimeError, match=r"rebuild\(\) before"):
        rebuilt.step()
    gates, seen = gates_of(twins.packed), set()
    for _ in range(3):
        ours.step()
        rebuilt.rebuild()
        is_open = gates.current_draw().z[: gates.count] != 0
        assert rebuilt.arm is not None
        widths = []
        for name, where in gates.slices():
            widths.append(rebuilt.arm.net.get_submodule(name).weight.shape[0])
            least = min(2, where.stop - where.start)
            assert widths[-1] == max(int(is_open[where].sum()), least), name
        seen.add(tuple(widths))
        rebuilt.step()
    assert len(seen) > 1
    assert not any(n.startswith("l0") for n, _ in rebuilt.arm.net.named_modules())


@pytest.mark.parametrize("form", ["NHWC", "NCHW"])
def test_arms_run_in_their_format(twins: oracle.Twins, form: str):
    entry = zoo.entry("densenet40")
    ours = zoo_arms.our_arm(entry, twins.packed, twins.inputs)
    ours.step()
    rebuilt = zoo_arms.Oracle(entry, ours, twins.inputs, form)
    rebuilt.rebuild()
    assert rebuilt.arm is not None
    for arm in (rebuilt.arm, zoo_arms.masked_arm(entry, twins, twins.inputs, form)):
        tensors = [arm.x, *(p for p in arm.net.parameters() if p.dim() == 4)]
        assert len(tensors) > 2
        for t in tensors:
            assert t.stride() == torch.empty_like(t, memory_format=zoo_arms.FORMATS[form]).stride()


def test_the_faster_format_is_taken(twins: oracle.Twins, monkeypatch: pytest.MonkeyPatch):
    slow = {"NHWC": [9.0, 1.0, 5.0], "NCHW": [4.0, 4.0, 4.0]}
    monkeypatch.setattr(zoo_arms, "interleave", lambda steps, *_, **__: {n: slow[n] for n in steps})
    entry = zoo.entry("densenet40")
    assert zoo_arms.best_masked(entry, twins, twins.inputs)[0] == "NCHW"
    ours = zoo_arms.our_arm(entry, twins.packed, twins.inputs)
    ours.step()
    form, rebuilt = zoo_arms.best_oracle(entry, ours, twins.inputs)
    assert (form, rebuilt.form) == ("NCHW", "NCHW")
    assert zoo_arms.formats_of(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2))) == ["NHWC"]


def test_ours_runs_before_the_oracle_of_its_widths(
    twins: oracle.Twins, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    entry = zoo.entry("densenet40")
    setting = replace(networks.QUICK, rounds=2)
    subject = networks.Subject(entry, setting, networks.Row(entry.name, 4))
    subject.twins = twins
    step, rebuild = zoo_arms.Arm.step, zoo_arms.Oracle.rebuild

    def told_step(arm: zoo_arms.Arm) -> None:
        step(arm)
        calls.append("ours" if arm.net is twins.packed else "other")

    def told_rebuild(arm: zoo_arms.Oracle) -> None:
        calls.append("rebuild")
        rebuild(arm)

    monkeypatch.setattr(zoo_arms.Arm, "step", told_step)
    monkeypatch.setattr(zoo_arms.Oracle, "rebuild", told_rebuild)
    subject.time_steps()
    told = [name for name in calls if name != "other"]
    # One per format at the first draw, then one per round, after ours.
    assert told == ["ours", "rebuild", "rebuild", "ours", "rebuild", "ours", "rebuild"]


def test_gates_at_half_open():
    net = networks.convert(zoo.entry("mlp").build("small"), zoo.entry("mlp").example("small", 2))
    gates = gates_of(net)
    networks.open_about_half(gates)
    z = gates.deterministic()
    assert 0.3 < float((z == 0).double().mean()) < 0.7
    assert float(((z > 0) & (z < 1)).double().mean()) > 0.2


def test_prediction_gap():
    entry = zoo.entry("mlp")
    masked = torch.tensor([[3.0, 2.0, 1.0], [4.0, 4.0 - 1e-6, 0.0]])
    other = torch.tensor([[3.0, 2.0, 1.0], [4.0, 5.0, 0.0]])
    assert networks.prediction_gap(entry, masked, other) == pytest.approx(2.5e-7, rel=0.1)
    assert networks.prediction_gap(entry, masked, masked) == 0.0


def test_errors_that_are_not_numbers_are_the_largest():
    assert networks.largest([1.0, float("nan"), 2.0]) != networks.largest([1.0, 2.0])
    assert networks.largest([1.0, 2.0]) == 2.0
