# SPDX-License-Identifier: Apache-2.0
"""All gated variants of a step compute the same; what they draw follows the hard concrete law."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import arms, index_select, masked, models, peers, timing, work

SMALL = ("mlp-784-300-100", "lenet5", "wrn-10-1")
PLAIN = (masked.MaskedAsWritten, masked.MaskedAtBest, index_select.IndexSelect)
BEFORE_NORM = (masked.AsWrittenBeforeNorm, masked.AtBestBeforeNorm)
NETWORKS = ("lenet5", "vgg16", "wrn-10-1", "resnet20", "mlp-block-768-3072")
WITH_NORMS = ("vgg16", "wrn-10-1", "resnet20")


def task(name: str, batch: int = 4) -> arms.Task:
    return arms.Task(models.network(name), batch, torch.device("cpu"))


def mixed_draw(sizes: list[int]) -> list[Tensor]:
    """Gates of every kind: 0, 1 and in between."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.rand(size, generator=generator).double() * 3 - 1 for size in sizes]
    return [draw.clamp(0, 1) for draw in draws]


def hooked_before_norm(
    net: nn.Module, groups: tuple[models.Group, ...], z: list[Tensor]
) -> nn.Module:
    """The definition: a plain network whose producers' outputs are multiplied by z."""
    for group, values in zip(groups, z, strict=True):
        scale = values.view(-1, 1, 1)
        producer = net.get_submodule(group.producer)
        producer.register_forward_hook(lambda _, args, y, scale=scale: y * scale)
    return net


def hooked(net: nn.Module, groups: tuple[models.Group, ...], z: list[Tensor]) -> nn.Module:
    """The definition: a plain network whose consumers' inputs are multiplied by z."""
    for group, values in zip(groups, z, strict=True):
        scale = values.repeat_interleave(group.spread)

        def times(module: nn.Module, args: tuple[Tensor, ...], scale: Tensor = scale) -> Tensor:
            x = args[0]
            return x * scale.view(1, -1, *[1] * (x.dim() - 2))

        net.get_submodule(group.consumer).register_forward_pre_hook(times)
    return net


@pytest.mark.parametrize(
    ("variant", "name"),
    [*itertools.product(PLAIN, NETWORKS), *itertools.product(BEFORE_NORM, WITH_NORMS)],
)
def test_plain_variant_is_the_definition(name: str, variant: type):
    network = models.network(name)
    net = network.build().double()
    z = [draw.requires_grad_() for draw in mixed_draw(models.full_widths(net, network.groups))]
    x, y = network.example(4)
    x = x.double()
    definition = hooked_before_norm if variant in BEFORE_NORM else hooked
    truth = definition(copy.deepcopy(net), network.groups, z)
    F.cross_entropy(truth(x), y).backward()
    exact = {key: p.grad for key, p in truth.named_parameters()}

    named = dict(net.named_parameters())
    gated = variant(net, network.groups, 1000).double()
    gated.pin([draw.detach() for draw in z])
    F.cross_entropy(gated(x), y).backward()

    assert torch.allclose(gated(x), truth(x), rtol=1e-10, atol=1e-12)
    for key, p in named.items():
        assert torch.allclose(p.grad, exact[key], rtol=1e-8, atol=1e-12), key
    got = torch.cat([p.grad for p in gated.gate_parameters()])
    values = torch.cat(list(z)).detach()
    s = (values - masked.GAMMA) / (masked.ZETA - masked.GAMMA)
    slope = (masked.ZETA - masked.GAMMA) / masked.BETA * s * (1 - s)
    slope = torch.where((values > 0) & (values < 1), slope, 0.0)
    expected = torch.cat([draw.grad for draw in z]) * slope
    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_variants_with_gates_before_norms_agree(keep: float):
    what = arms.Task(models.network("wrn-10-1"), 3, torch.device("cpu"), place="before_norm")
    net = arms.make_arm(what, "ours", keep).net
    assert any(isinstance(m, l0.nn.GatedConv2d) and m.makes_constants for m in net.modules())
    errors = arms.require_agreement(what, net, arms.BEFORE_NORM)
    assert set(errors) == {"masked-nchw"}
    assert arms.require_agreement(what, net, ["ours"])["ours"] < 1e-9
    found = {name: arms.make_arm(what, name, keep) for name in arms.BEFORE_NORM}
    assert set(arms.require_closeness(what, found)) == set(arms.BEFORE_NORM)
    reasons = {name: arms.why_not(what, name) for name in arms.ALL_VARIANTS}
    refused = {name for name, reason in reasons.items() if "before norms" in reason}
    assert refused == {"index-select", "masked-compiled", "torch-prune", "torch-pruning"}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_all_variants_agree(name: str, keep: float):
    what = task(name)
    net = arms.make_arm(what, "ours", keep).net
    errors = arms.require_agreement(what, net, arms.VARIANTS)
    assert set(errors) == {"masked-nchw", "index-select", "ours"}


def test_disagreement_is_refused(monkeypatch: pytest.MonkeyPatch):
    what = task("lenet5")
    net = arms.make_arm(what, "ours", 0.5).net
    fill = index_select.Slot.fill

    def slightly_wrong(slot: index_select.Slot, z: Tensor) -> None:
        fill(slot, z)
        slot.scale = slot.scale * 1.001

    monkeypatch.setattr(index_select.Slot, "fill", slightly_wrong)
    with pytest.raises(RuntimeError, match="within 1e-08 .* got {'index-select'.*no figures"):
        arms.require_agreement(what, net, ["ours", "index-select"])


def test_draws_follow_the_law():
    log_alpha = torch.full((40_000,), 0.4)
    z = masked.hard_concrete(log_alpha, masked.draw_noise(log_alpha))
    for got, p in (
        ((z != 0).double().mean(), torch.sigmoid(torch.tensor(0.4 - masked.SHIFT))),
        ((z == 1).double().mean(), torch.sigmoid(torch.tensor(0.4 + masked.SHIFT))),
    ):
        assert abs(got - p) < 5 * math.sqrt(float(p * (1 - p)) / len(z))


def test_noise_repeats_a_draw():
    log_alpha = torch.linspace(-4, 4, 500).double()
    z = masked.hard_concrete(log_alpha, masked.draw_noise(log_alpha))
    again = masked.hard_concrete(log_alpha, masked.noise_for(z, log_alpha))
    assert torch.allclose(again, z, rtol=0, atol=1e-14)
    assert torch.equal(again == 0, z == 0)
    assert torch.equal(again == 1, z == 1)


def test_log_alpha_for_open_fraction():
    for keep in (0.1, 0.25, 0.5, 0.9):
        p = masked.open_probability(torch.tensor(arms.log_alpha_for(keep), dtype=torch.float64))
        assert float(p) == pytest.approx(keep, rel=1e-9)
    assert arms.log_alpha_for(1.0) == pytest.approx(math.log(100))
    with pytest.raises(ValueError, match="expected 0 < keep <= 1, got 0"):
        arms.log_alpha_for(0)


def test_open_units_keeps_two():
    cases = {
        (0.0, 0.3, 0.0, 1.0): [1, 3],
        (0.0, 0.0, 0.5, 0.0): [0, 2],
        (0.0, 0.0, 0.0): [0, 1],
        (0.7, 0.0): [0, 1],
        (0.0,): [0],
    }
    for z, expected in cases.items():
        assert index_select.open_units(torch.tensor(z)).tolist() == expected


def test_packed_weight_keeps_channels_last():
    weight = torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)
    source, target = index_select.Slot(1), index_select.Slot(1)
    z_in = torch.tensor([0, 0.5, 1, 0, 0.25, 0, 0, 1])
    source.fill(z_in)
    target.fill(torch.tensor([1.0, 0, 1, 0, 0, 0.5]))
    packed = index_select.pack(weight, source, target)
    assert packed.is_contiguous(memory_format=torch.channels_last)
    expected = (weight * z_in.view(-1, 1, 1))[[0, 2, 5]][:, [1, 2, 4, 7]]
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("variant", ["masked-best", "index-select", "oracle-rounded", "ours"])
def test_steps_equal_the_usual_optimizer(variant: str):
    what = task("wrn-10-1")
    arm, other = (arms.make_arm(what, variant, 0.5) for _ in range(2))
    usual = torch.optim.SGD(
        [{"params": [p for p in other.trained if all(p is not g for g in other.gates)]}],
        lr=arms.LEARNING_RATE,
        momentum=arms.MOMENTUM,
        weight_decay=arms.WEIGHT_DECAY,
        nesterov=True,
    )
    torch.manual_seed(3)
    for _ in range(3):
        arm.step()
    torch.manual_seed(3)
    for _ in range(3):
        usual.zero_grad()
        other.loss(other.x, other.y).backward()
        usual.step()
    for mine, theirs in zip(arm.trained, other.trained, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_open_rows_are_updated_as_all_rows_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0kernels.optim.rows.LEAST", 1 << 14)
    plain = task("wrn-10-2")
    arm = arms.make_arm(replace(plain, open_rows=True), "ours", 0.25)
    other = arms.make_arm(plain, "ours", 0.25)
    assert arm.optimizer.row_weights
    for _ in range(5):
        arm.step()
        other.step()
    waits = {name: t.detach().clone() for name, t in arm.net.named_parameters()}
    arm.optimizer.flush()
    assert any(not torch.equal(waits[n], t) for n, t in arm.net.named_parameters())
    for mine, theirs in zip(arm.trained, other.trained, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["masked-nchw", "masked-best", "index-select", "ours"])
def test_gates_stay_where_they_are_set(variant: str):
    arm = arms.make_arm(task("lenet5"), variant, 0.25)
    first = arm.loss(arm.x, arm.y)
    arm.step()
    arm.step()
    for gate in arm.gates:
        assert torch.equal(gate, torch.full_like(gate, arms.log_alpha_for(0.25)))
        assert gate.grad is not None and gate.grad.abs().sum() > 0
    assert arm.loss(arm.x, arm.y) != first


@pytest.mark.parametrize("steps", [1, 3])
def test_oracle_is_rebuilt_at_the_widths_that_ours_draws(steps: int):
    what = task("wrn-10-1")
    ours = arms.make_arm(what, "ours", 0.5)
    ours.step()
    oracle = arms.Oracle(what, 0.5, int(ours.net.l0.step), steps)
    with pytest.raises(RuntimeError, match=r"rebuild\(\) before"):
        oracle.step()
    seen = set()
    for _ in range(4):
        timing.repeated(ours.step, steps)
        oracle.rebuild()
        widths = models.full_widths(oracle.arm.net, what.network.groups)
        assert widths == [ours.net.l0[name].count for name in ours.net.l0.names]
        seen.add(tuple(widths))
        oracle.step()
    assert len(seen) > 1


def test_networks_are_built_at_given_widths():
    network = models.network("vgg16")
    widths = list(range(3, 3 + len(network.groups)))
    assert models.full_widths(network.build_at(widths), network.groups) == widths
    for wrong, said in ((widths[1:], "fewer"), ([*widths, 4], "more")):
        with pytest.raises(ValueError, match=f"expected 13 widths, got {said}"):
            network.build_at(wrong)


def test_rounded_oracle_is_built_small():
    arm = arms.make_arm(task("wrn-10-1"), "oracle-rounded", 0.25)
    assert models.full_widths(arm.net, models.network("wrn-10-1").groups) == [4, 8, 16]
    assert arm.gates == []


def test_unknown_variant():
    for name in ("sparse", "oracle"):
        with pytest.raises(ValueError, match=f"expected one of dense, .* got '{name}'"):
            arms.make_arm(task("lenet5"), name)


def test_contiguous_view_shares_memory_or_refuses():
    weight = torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last)
    view = arms.contiguous_view(weight)
    assert view.is_contiguous() and view.data_ptr() == weight.data_ptr()
    assert arms.contiguous_view(view) is view
    with pytest.raises(RuntimeError, match="expected a contiguous or channels_last"):
        arms.contiguous_view(weight.transpose(0, 1))


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "mlp-block-768-3072"])
def test_pruning_peers_have_the_widths_of_the_rounded_oracle(name: str):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    what = task(name)
    rounded = arms.make_arm(what, "oracle-rounded", 0.3)
    cut = arms.make_arm(what, "torch-pruning", 0.3)
    masks = arms.make_arm(what, "torch-prune", 0.3)
    shapes = {key: p.shape for key, p in rounded.net.named_parameters()}
    assert {key: p.shape for key, p in cut.net.named_parameters()} == shapes
    for group in what.network.groups:
        mask = masks.net.get_buffer(f"{group.producer}.weight_mask").flatten(1).amax(1)
        assert int(mask.sum()) == shapes[f"{group.producer}.weight"][0]
        full = masks.net.get_parameter(f"{group.producer}.weight_orig").detach()
        # Both drop the same filters.
        kept = cut.net.get_parameter(f"{group.producer}.weight")
        norms = full.flatten(1).norm(dim=1)[mask != 0]
        if group is what.network.groups[0]:
            assert torch.allclose(kept.flatten(1).norm(dim=1), norms)
        assert float(norms.min()) >= float(full.flatten(1).norm(dim=1)[mask == 0].max())


def test_ungated_variants_are_near_their_twins():
    what = task("lenet5")
    made = {name: arms.make_arm(what, name, 0.3) for name in ("dense", "torch-prune")}
    for name in arms.REBUILT:
        oracle = arms.Oracle(what, 0.3, onednn=name == "oracle-onednn")
        oracle.rebuild()
        made[name] = oracle
    for name in ("masked-best", "masked-nchw", "index-select"):
        made[name] = arms.make_arm(what, name, 0.3)
    found = arms.require_closeness(what, made)
    assert set(found) == set(made)
    assert found.pop("oracle-onednn") < 1e-5 and max(found.values()) < 1e-12
    assert all(p.grad is None for p in made["dense"].trained)


def test_compiled_masks_are_compiled_and_checked(monkeypatch: pytest.MonkeyPatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    what = task("lenet5")
    arm = arms.make_arm(what, "masked-compiled", 0.5)
    arm.step()
    assert compiled == [arm.net] and isinstance(arm.net, masked.MaskedAtBest)
    assert arms.require_closeness(what, {"masked-compiled": arm})["masked-compiled"] < 1e-5
    right = arms.plain_outcome

    def other(*arguments: object) -> arms.Outcome:
        found = right(*arguments)
        return arms.Outcome(found.loss * 1.1, found.weights, found.gates)

    monkeypatch.setattr(arms, "plain_outcome", other)
    with pytest.raises(RuntimeError, match="of its twin, got {'masked-compiled'"):
        arms.require_closeness(what, {"masked-compiled": arm})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 7)])
def test_linear_layers_in_onednn(shape: tuple[int, ...], bias: bool):
    plain = nn.Linear(7, 6, bias=bias)
    own = peers.with_onednn(copy.deepcopy(nn.Sequential(plain)))
    assert type(own[0]) is peers.OneDNNLinear
    x = torch.randn(shape)
    found = []
    for net in (plain, own):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
        grads = torch.autograd.grad(y, [leaf, *net.parameters()], upstream)
        found.append((y, *grads))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", SMALL)
def test_oracle_in_onednn_only_where_linear_layers_matter(name: str):
    reason = arms.why_not(task(name), "oracle-onednn")
    assert (reason == "") == (name != "wrn-10-1")
    assert "float32 only" in arms.why_not(
        arms.Task(models.network(name), 4, torch.device("cpu"), amp=torch.bfloat16), "oracle-onednn"
    )


def test_work_left():
    network = models.network("mlp-784-300-100")
    full = 784 * 300 + 300 * 100 + 100 * 10
    assert work.operations(network, 1.0) == 2 * (3 * full - 784 * 300)  # no gradient of the input
    half = 784 * 150 + 150 * 50 + 50 * 10
    assert work.work_left(network, 0.5) == (3 * half - 784 * 150) / (3 * full - 784 * 300)
    assert work.work_left(models.network("resnet20"), 1.0) == 1.0
