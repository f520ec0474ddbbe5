# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench cost`: what is counted, the model, and what it is compared with."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import l0kernels as l0
from l0kernels.bench import cost, kernels, models
from l0kernels.bench.arms import Task
from l0kernels.bench.kernels import Counter, Kernel, kernels_of
from l0kernels.bench.work import operations
from l0kernels.cli import main
from l0kernels.functional import pack_weights, packed_norm

BATCH = 8
PRODUCTS = ("forward", "dgrad", "wgrad", "product")


def task(name: str, amp: torch.dtype | None = None) -> Task:
    return Task(models.network(name), BATCH, torch.device("cpu"), amp=amp)


def of_kind(found: list[Kernel], *kinds: str) -> list[Kernel]:
    return [kernel for kernel in found if kernel.kind in kinds]


def flop(found: list[Kernel]) -> int:
    return sum(kernel.flop for kernel in of_kind(found, *PRODUCTS))


def test_a_convolution_by_hand():
    (images, inputs, outputs, pixels), half = (2, 3, 5, 7), torch.bfloat16
    x = torch.randn(images, inputs, pixels, pixels, dtype=half, requires_grad=True)
    weight = torch.randn(outputs, inputs, 3, 3, dtype=half, requires_grad=True)
    bias = torch.randn(outputs, dtype=half, requires_grad=True)
    upstream = torch.ones(2, 5, 7, 7, dtype=half)
    with Counter() as counter:
        F.conv2d(x, weight, bias, padding=1).backward(upstream)
    read, made = images * inputs * pixels**2, images * outputs * pixels**2
    moved, work = 2 * (read + made + outputs * inputs * 9), 2 * made * inputs * 9
    assert of_kind(counter.kernels, *PRODUCTS) == [
        Kernel("forward", moved, work, half),
        Kernel("dgrad", moved, work, half),
        Kernel("wgrad", moved, work, half),
    ]
    biases = [kernel.bytes for kernel in of_kind(counter.kernels, "elementwise")]
    assert biases == [2 * (2 * made + outputs), 2 * (made + outputs)]


def test_a_product_by_hand():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with Counter() as counter:
        a @ b
    moved = 4 * (3 * 4 + 4 * 5 + 3 * 5)
    assert counter.kernels == [Kernel("product", moved, 2 * 3 * 4 * 5)]


@pytest.mark.parametrize("ours", [True, False])
def test_a_norm_by_hand(ours: bool):
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3)
    mean, var, index = torch.zeros(3), torch.ones(3), torch.arange(3)
    with Counter() as counter:
        if ours:
            gates = (torch.ones(4), torch.stack((index, torch.full_like(index, 3))))
            y = packed_norm(x, weight, bias, mean, var, index, *gates, True)
        else:
            y = F.batch_norm(x, mean, var, weight, bias, True)
        y.backward(torch.ones_like(y))
    numbers = 4 * 3 * 25
    assert of_kind(counter.kernels, "norm") == [
        Kernel("norm", 3 * 2 * numbers, 8 * numbers, launches=3),
        Kernel("norm", 5 * 2 * numbers, 17 * numbers, launches=3),
    ]


def test_packing_by_hand():
    """6 of 8 rows and 4 of 10 columns: rows are read whole."""
    weight = torch.randn(8, 10, requires_grad=True)
    maps = torch.stack((torch.arange(18), torch.full((18,), 18)))
    index = torch.cat((torch.arange(6), torch.zeros(2).long(), torch.arange(4), torch.zeros(6)))
    z = torch.ones(19, requires_grad=True)
    with Counter() as counter:
        packed = pack_weights(
            [weight], z, index.long(), maps, [(0, 6, 8, 4)], dtype=torch.bfloat16
        )[0]
        packed.backward(torch.ones_like(packed))
    assert packed.shape == (6, 4)
    assert of_kind(counter.kernels, "pack", "unpack") == [
        Kernel("pack", 4 * 60 + 2 * 24, 24),
        Kernel("unpack", 4 * 60 + 2 * 24 + 4 * 80, 3 * 24, launches=2),
    ]


def test_the_optimizer_by_hand():
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (10, 70_000)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Counter() as counter:
        optimizer.step()
    assert counter.kernels == [Kernel("optimizer", 20 * 70_010, 6 * 70_010)]
    many = [torch.nn.Parameter(torch.randn(2)) for _ in range(kernels.MOST_TENSORS + 1)]
    for parameter in many:
        parameter.grad = torch.ones_like(parameter)
    with Counter() as counter:
        torch.optim.SGD(many, lr=0.1, momentum=0.9, fused=True).step()
    assert [kernel.launches for kernel in of_kind(counter.kernels, "optimizer")] == [2]


def test_in_place_and_expanded():
    x, row = torch.randn(4, 6), torch.randn(6)
    with Counter() as counter:
        x.add_(row.expand(4, 6))
        x.view(24)
        x.t()
    assert counter.kernels == [Kernel("elementwise", 4 * (24 + 6 + 24), 24)]


@pytest.mark.parametrize("name", ["lenet5", "wrn-10-1"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_all_open_it_is_what_pytorch_counts(name: str, amp: torch.dtype | None):
    whole = BATCH * operations(models.network(name), 1.0)
    for variant in ("dense", "masked-best", "masked-nchw", "oracle"):
        (found,) = kernels_of(task(name, amp), variant, (1.0,))
        assert flop(found) == whole
        lower = {k.dtype for k in of_kind(found, *PRODUCTS)}
        assert lower == {torch.float32 if amp is None else amp}


def test_an_oracle_is_what_pytorch_counts():
    keeps = (1.0, 0.5, 0.1)
    for keep, found in zip(keeps, kernels_of(task("wrn-10-1"), "oracle", keeps), strict=True):
        assert flop(found) == BATCH * operations(models.network("wrn-10-1"), keep)


def test_ours_follows_the_open_units():
    keeps = (0.5, 1.0, 0.1)
    half, whole, tenth = kernels_of(task("lenet5", torch.bfloat16), "ours", keeps)
    assert flop(whole) == BATCH * operations(models.network("lenet5"), 1.0)
    for kind in ("product", "forward", "wgrad"):
        for what in ("flop", "bytes"):
            sums = [sum(getattr(k, what) for k in of_kind(x, kind)) for x in (whole, half, tenth)]
            assert sums[0] > sums[1] > sums[2] > 0
    # The launches that tests/harness/test_launches.py counts in the sources.
    for one in (half, tenth):
        launches = {
            k: sum(x.launches for x in of_kind(one, k)) for k in ("gates", "pack", "unpack")
        }
        assert launches == {"gates": 2, "pack": 1, "unpack": 2}
    parameters = sum(p.numel() for p in models.network("lenet5").build().parameters())
    for one in (half, whole, tenth):
        moved = sum(kernel.bytes for kernel in of_kind(one, "optimizer"))
        assert moved == 20 * (parameters + 570)


def test_less_open_is_less_busy():
    wide = Task(models.network("mlp-1024-4096-1024"), 8192, torch.device("cpu"))
    steps = kernels_of(wide, "oracle", (1.0, 0.5, 0.25, 0.1))
    for device in cost.DEVICES.values():
        busy = [sum(cost.seconds(kernel, device) for kernel in step) for step in steps]
        assert busy == sorted(busy, reverse=True)
        assert len(set(busy)) == 4


def test_the_trace_leaves_the_real_batch_alone():
    once, twice = (kernels_of(task("mlp-784-300-100"), "dense", (1.0,))[0] for _ in range(2))
    assert once == twice
    wide = Task(models.network("mlp-784-300-100"), 1024 * BATCH, torch.device("cpu"))
    (found,) = kernels_of(wide, "dense", (1.0,))
    assert flop(found) == 1024 * flop(once)


def test_an_operator_of_ours_that_nobody_counted():
    with Counter(), pytest.raises(ValueError, match="l0kernels::gate_apply"):
        z, maps = torch.ones(4), torch.stack((torch.arange(3), torch.full((3,), 3)))
        l0.functional.gate_apply(torch.randn(2, 3), z, maps, -1)


def test_seconds():
    device = cost.Device("some", 1e12, {"half": 1e15, "tf32": 5e14, "f32": 1e14, "f64": 1e13}, "")
    parts = cost.ATTAINED
    memory = Kernel("elementwise", 10**10, 1)
    assert cost.seconds(memory, device) == pytest.approx(1e-2 / parts["memory"])
    for kind, dtype, rate in (
        ("forward", torch.bfloat16, 1e15 * parts["convolution"]),
        ("wgrad", torch.float32, 5e14 * parts["convolution"]),
        ("product", torch.float16, 1e15 * parts["product"]),
        ("product", torch.float32, 1e14 * parts["product"]),
        ("gates", torch.float64, 1e13),
        ("norm", torch.float32, 1e14),
    ):
        assert cost.seconds(Kernel(kind, 1, 10**15, dtype), device) == pytest.approx(1e15 / rate)
    empty = Kernel("norm", 1, launches=3)
    assert cost.seconds(empty, device) == pytest.approx(3 * cost.EMPTY_KERNEL)
    assert cost.DEVICES["h100"].memory < cost.DEVICES["h200"].memory < cost.DEVICES["b200"].memory


def quick(**given) -> cost.Setting:
    fixed = {"model": "mlp-784-300-100", "keep": (1.0, 0.5), "variants": ("dense", "oracle")}
    return cost.Setting(**{"amp": "none", **fixed, **given})


def test_eager_is_the_longer_of_gpu_and_host(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    for launch in (0.0, 1000.0):
        report = cost.predict(quick(launch=launch))
        for row in report.rows:
            assert row.host_ms == pytest.approx(launch * row.launches / 1e3)
            assert row.eager_ms == max(row.busy_ms, row.host_ms) > 0
            assert (row.eager_ms == row.busy_ms) == (launch == 0)
            assert row.busy_ms == pytest.approx(sum(work.ms for work in row.works))
    order = {row.device: row.busy_ms for row in report.rows if row.keep == 0.5}
    assert order["h100"] >= order["h200"] >= order["b200"]


def write_results(path: Path, figures: list[tuple[str, str, int, str, float | str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("stage", "part", "row", "figure", "value"))
        writer.writerows(figures)


@pytest.mark.parametrize("took", [10.0, 20.0])
def test_measurements_come_from_the_file(tmp_path: Path, monkeypatch, took: float):
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    stage = "step mlp-784-300-100 none"
    rows = [(stage, "", 0, "keep", 0.5), (stage, "", 0, "ms dense", took)]
    conv = {"channels": 16, "pixels": 8, "forward ms": took, "dgrad ms": took, "wgrad ms": took}
    rows += [("experiments", "widths", 0, name, value) for name, value in conv.items()]
    profile = {"variant": "masked-best", "kernels": took, "GPU busy ms": took}
    rows += [("experiments", "launches", 0, name, value) for name, value in profile.items()]
    write_results(tmp_path / "nvidia-h200.csv", rows)
    monkeypatch.setitem(cost.experiments.FULL, "network", ("mlp-784-300-100", 128))
    report = cost.predict(quick(devices=("h100", "h200"), batch=128))
    measured = {(r.device, r.variant, r.keep): r.measured_ms for r in report.rows}
    assert measured.pop(("h200", "dense", 0.5)) == took
    assert set(measured.values()) == {None}
    (row,) = (r for r in report.rows if r.measured_ms is not None)
    assert row.off == pytest.approx(row.eager_ms / took - 1)
    assert f"dense {row.off:+.0%} (at worst {row.off:+.0%})." in cost.table(report)
    found = {one.what: one.median for one in report.comparisons}
    kinds = {
        k.kind: 1e3 * cost.seconds(k, cost.DEVICES["h200"]) for k in cost.convolution(128, 16, 8)
    }
    for kind, ms in kinds.items():
        what = f"h200: 3x3 convolutions, {kind}, channels: fewer"
        assert found.pop(what) == pytest.approx(ms / took)
    whole = Task(models.network("mlp-784-300-100"), 128, torch.device("cpu"))
    (traced,) = kernels_of(whole, "masked-best", (0.5,))
    launches = sum(kernel.launches for kernel in traced) / took
    assert list(found.values())[0] == pytest.approx(launches)
    assert all("mlp-784-300-100" in what for what in found)


def test_the_recorded_steps_are_found():
    path = Path(cost.RESULTS, "nvidia-h200.csv")
    if not path.exists():
        pytest.skip("bench/results is not part of a source distribution")
    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["stage"] == "step wrn-28-10 bf16"]
    wanted = {r["row"]: float(r["value"]) for r in rows if r["figure"] == "keep"}
    measured = cost.Measured(cost.DEVICES["h200"])
    for row, keep in wanted.items():
        (ms,) = (float(r["value"]) for r in rows if (r["row"], r["figure"]) == (row, "ms ours"))
        assert measured.step(cost.Setting(), "ours", keep) == ms
    assert len(wanted) == 4
    assert measured.step(cost.Setting(batch=64), "ours", 0.5) is None
    assert len(measured.rows("experiments", "launches")) == 3
    assert not cost.Measured(cost.DEVICES["b200"]).rows("step wrn-28-10 bf16")


COMMAND = ["bench", "cost", "--model", "mlp-784-300-100", "--amp", "none", "--devices", "h200"]


def test_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    given = ["--keep", "1,.5", "--variants", "dense,ours", "--out", str(tmp_path)]
    assert main([*COMMAND, *given]) == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured" in text
    assert "predicted over measured" not in text
    assert (tmp_path / "cost.md").read_text() == text
    written = json.loads((tmp_path / "cost.json").read_text())
    assert [(r["variant"], r["keep"]) for r in written["rows"]] == [
        ("dense", 1.0),
        ("dense", 0.5),
        ("ours", 1.0),
        ("ours", 0.5),
    ]
    assert all(math.isfinite(w["ms"]) for r in written["rows"] for w in r["works"])
    assert written["command"] == (
        "l0kernels bench cost --devices h200 --model mlp-784-300-100 --keep 1,0.5 "
        "--variants dense,ours --amp none"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "open fractions in"),
        (["--devices", "tpu"], "expected devices of h100"),
        (["--variants", "index-select"], "index-select"),
        (["--variants", "nothing"], "nothing"),
        (["--batch", "0"], "batch >= 1"),
        (["--launch", "-1"], "launch cost"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*COMMAND, *options]) != 0
    assert message in capsys.readouterr().err
