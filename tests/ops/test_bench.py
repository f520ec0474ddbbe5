# SPDX-License-Identifier: Apache-2.0
"""The operators' benchmarks compare like with like, and print what they measured."""

import pytest
import torch

from l0kernels.bench.ops import (
    gated_conv2d,
    gated_linear,
    pack_weight,
    packed_norm,
    sample_gates,
    sgd_rows,
)


@pytest.mark.parametrize("mode", pack_weight.MODES)
@pytest.mark.parametrize("shape", [(12, 10, 3, 3), (12, 10)], ids=str)
def test_packing_arms_compute_the_same(shape, mode):
    problem = pack_weight.make_problem(shape, mode, 0.5)
    ours, plain = problem.ours(), problem.plain()
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad(packed, problem.inputs(), upstream) for packed in (ours, plain)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)


def test_plain_draws_follow_the_law_of_ours():
    log_alpha, cost = torch.zeros(1 << 16), torch.ones(1 << 16)
    z, penalty = sample_gates.plain_draw(log_alpha, cost)
    layout = sample_gates.one_port_per_group([1 << 16])
    key = torch.tensor([1, 1])
    ours, expected, _ = sample_gates.sample_gates(log_alpha, key, cost, layout, "hard_concrete")
    torch.testing.assert_close(penalty, expected)
    assert float(z.mean()) == pytest.approx(float(ours[:-1].mean()), abs=0.01)
    assert float((z == 0).float().mean()) == pytest.approx(0.1682, abs=0.01)


def test_draw_arms_are_timed():
    rows = sample_gates.measure((20, 30), rounds=1, repeats=1)
    assert [row["arm"] for row in rows] == [
        sample_gates.OURS,
        sample_gates.LAYERS,
        sample_gates.FLAT,
    ]
    assert all(row["us"]["median"] > 0 for row in rows)
    assert rows[0]["times_slower"]["median"] == 1
    assert len(sample_gates.table(rows).splitlines()) == 4


def test_packing_arms_are_timed():
    rows = pack_weight.measure([(12, 10, 3, 3)], ["both"], [0.5], rounds=1)
    assert [(row["shape"], row["mode"], row["open"]) for row in rows] == [
        ([12, 10, 3, 3], "both", 0.5)
    ]
    assert rows[0]["forward"]["us"] > 0 and rows[0]["backward"]["times_slower"]["median"] > 0
    assert "12x10x3x3" in pack_weight.table(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", packed_norm.LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (9, 7)], ids=str)
def test_norm_arms_compute_the_same(shape, layout, training):
    problem = packed_norm.make_problem(shape, layout, training=training)
    found = []
    for arm in (problem.plain, problem.ours):
        problem.mean.zero_(), problem.var.fill_(1)
        y = arm()
        grads = torch.autograd.grad(
            y, problem.inputs(), torch.linspace(-1, 1, y.numel()).view(shape)
        )
        found.append((y, *grads, problem.mean.clone(), problem.var.clone()))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_norm_arms_are_timed():
    rows = packed_norm.measure([(5, 7, 3, 3), (9, 7)], dtypes=["f32"], rounds=1)
    assert [row["layout"] for row in rows] == ["channels_last", "contiguous", "contiguous"]
    for row in rows:
        assert all(row[what]["us"] > 0 for what in ("forward", "backward", "eval"))
    assert len(packed_norm.table(rows).splitlines()) == 4


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize(
    ("layer", "shape"), [(gated_linear, (20, 12, 5)), (gated_conv2d, (8, 6, 3, 5, 2))]
)
def test_arms_of_gated_layers_compute_the_same(layer, shape, fraction):
    problem = layer.make_problem(shape, fraction)
    rows, cols = problem.gates.open_outputs(), problem.gates.open_inputs()
    scale = problem.gates.z[: problem.gates.inputs][cols].detach()
    with torch.no_grad():  # the packed layer has no gates
        problem.x[:, : len(cols)] *= scale.reshape(-1, *[1] * (problem.x.dim() - 2))
        problem.gates.z[: problem.gates.inputs][cols] = 1
        problem.wide_x[:, cols] = problem.x[:, : len(cols)]
    packed = problem.packed()
    y, plain, small = problem.ours(), problem.plain(), packed.run()
    torch.testing.assert_close(y[:, : len(rows)], plain[:, rows])
    torch.testing.assert_close(small, plain[:, rows])
    upstream = torch.randn_like(small)
    wide = torch.zeros_like(plain).index_copy(1, rows, upstream)
    (ours,) = torch.autograd.grad(
        y,
        problem.weight,
        torch.nn.functional.pad(upstream, [0, 0] * (y.dim() - 2) + [0, y.shape[1] - len(rows)]),
    )
    (masked,) = torch.autograd.grad(plain, problem.weight, wide)
    (little,) = torch.autograd.grad(small, packed.leaves[1], upstream)
    torch.testing.assert_close(ours, masked)
    torch.testing.assert_close(little, masked[rows][:, cols])


def test_table_of_gated_layers():
    (row,) = gated_linear.measure([(20, 12, 5)], (0.5,), 1)
    assert min(row["forward"]["us"], row["backward"]["over_oracle"]["median"]) > 0
    assert len(gated_linear.table([row]).splitlines()) == 2


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_sgd_arms_compute_the_same(keep):
    problem = sgd_rows.make_problem((40, 6), keep)
    for _ in range(20):
        problem.ours()
        problem.plain()
    problem.flush()
    torch.testing.assert_close(problem.weight, problem.twin)
    assert problem.now == problem.twins == 20


def test_sgd_arms_are_timed():
    rows = sgd_rows.measure([(40, 6)], [0.5], rounds=1)
    assert [(row["shape"], row["open"]) for row in rows] == [([40, 6], 0.5)]
    assert rows[0]["us"] > 0 and rows[0]["times_slower"]["median"] > 0
    assert "40x6" in sgd_rows.table(rows)
