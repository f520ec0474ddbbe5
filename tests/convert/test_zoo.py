# SPDX-License-Identifier: Apache-2.0
"""Every network of the zoo: the right groups, the right refusals, packed equal to masked."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import l0kernels as l0
from l0kernels.bench import oracle, zoo
from l0kernels.gates import Gates
from l0kernels.nn import GatedLayer

DRAWS = 50
EVAL_DRAWS = 5
TOLERANCE = 1e-9
BATCH = 4
# Module names of a layer's attention, its makers and its reader, and the gates of one layer.
HEADS = {
    "vit": ("vit.layers.*.attention.", ("q_proj", "k_proj", "v_proj"), "o_proj", 4),
    "bert": (
        "bert.encoder.layer.*.attention.",
        ("self.query", "self.key", "self.value"),
        "output.dense",
        4,
    ),
    "llama": ("model.layers.*.self_attn.", ("q_proj", "k_proj", "v_proj"), "o_proj", 4),
    # Its forward splits query, key and value at fixed widths: heads close where they are read.
    "gpt2": ("transformer.h.*.attn.", (), "c_proj", 4),
}
IN_FP32 = ("mobilenetv3", "unet", "densenet40", "signal", "convnext", "gpt2", "llama")


def entry(name: str) -> zoo.Entry:
    found = zoo.entry(name)
    if not found.available():
        pytest.skip(f"{found.needs} is not installed")
    return found


def converted(name: str, **options: Any) -> oracle.Twins:
    found = entry(name)
    plain = oracle.perturb(found.build("small"))
    inputs = found.example("small", BATCH)
    packed = l0.convert(copy.deepcopy(plain), "hard_concrete", example_inputs=inputs, **options)
    return oracle.twins(packed, plain, inputs)


@pytest.fixture(scope="module", params=[e.name for e in zoo.entries()])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def twins(name: str) -> oracle.Twins:
    """One conversion serves all tests of a network; they leave it as it was."""
    return converted(name)


def gates_of(net: nn.Module) -> Gates:
    assert isinstance(net.l0, Gates)
    return net.l0


def test_exactly_the_expected_groups(name: str, twins: oracle.Twins):
    expected = entry(name).expected(twins.plain)
    assert sorted(oracle.groups_of(twins.packed)) == sorted(expected.gated)


def test_every_unit_of_a_producer_has_its_own_gate(twins: oracle.Twins):
    for _, where in gates_of(twins.packed).slices():
        flat = torch.arange(where.start, where.stop)
        for layer in twins.packed.modules():
            if isinstance(layer, GatedLayer) and zoo.makes_units(layer):
                made = layer.out_gate
                if made is not None and bool(torch.isin(made.maps[0], flat).any()):
                    assert made.maps[0].tolist() == flat.tolist()


def test_the_others_are_refused_with_the_reason(name: str, twins: oracle.Twins):
    refused = l0.report(twins.packed).ungated
    expected = entry(name).expected(twins.plain).refused
    wrong = {
        layer: refused.get(layer, "not in the report")
        for layer, reason in expected.items()
        if not re.search(reason, refused.get(layer, ""))
    }
    assert wrong == {}
    assert set(refused) == set(expected)


def test_packed_equals_masked_in_fp64(twins: oracle.Twins):
    exact = twins.to(torch.float64)
    sizes = gates_of(exact.packed).sizes
    for training in (True, False):
        exact.train(training)
        for seed in range(DRAWS if training else EVAL_DRAWS):
            z = oracle.gate_values(sizes, seed)
            masked, packed = exact.run_masked(z), exact.run_packed(z)
            errors = oracle.relative_errors(masked, packed)
            worst = max(errors, key=errors.__getitem__)
            assert errors[worst] <= TOLERANCE, (training, seed, worst, errors[worst])
            assert exact.open_where_closed(z, packed) == [], (training, seed)


@pytest.mark.parametrize("chosen", IN_FP32)
def test_packed_fp32_errs_at_most_twice_as_much_as_masked_fp32(chosen: str):
    for kind, (ours, theirs) in oracle.fp32_errors(converted(chosen), range(5, 14)).items():
        assert ours <= 2 * theirs + torch.finfo(torch.float32).eps, kind


@pytest.mark.parametrize("name", HEADS)
def test_attention_heads_as_units(name: str):
    """Query, key and value of a head share its gate, as do query heads that share key and value."""
    layers, makers, reader, heads = HEADS[name]
    twins = converted(name, select=l0.select.heads | l0.select.inner)
    wanted = [
        zoo.Gated(tuple(sorted(f"{layer}{m}" for m in makers)), (f"{layer}{reader}",))
        for layer in (layers.replace("*", str(k)) for k in range(2))
    ]
    assert sorted(oracle.groups_of(twins.packed)) == sorted(
        (*wanted, *entry(name).expected(twins.plain).gated)
    )
    gates = gates_of(twins.packed)
    for group in wanted:
        where = dict(gates.slices())[f"{group.consumers[0]}.heads"]
        read = twins.packed.get_submodule(group.consumers[0])
        assert isinstance(read, GatedLayer) and read.in_gate is not None
        flat = torch.arange(where.start, where.stop)
        assert len(flat) == heads
        assert torch.equal(read.in_gate.maps[0], flat.repeat_interleave(16 // heads))
    exact = twins.to(torch.float64)
    for seed in range(DRAWS):
        z = oracle.gate_values(gates.sizes, seed)
        masked, packed = exact.run_masked(z), exact.run_packed(z)
        assert max(oracle.relative_errors(masked, packed).values()) <= TOLERANCE, seed
        assert exact.open_where_closed(z, packed) == [], seed


def test_convert_again_gives_the_same(name: str, twins: oracle.Twins):
    again = converted(name)
    first, second = gates_of(twins.packed), gates_of(again.packed)
    assert (first.names, first.sizes) == (second.names, second.sizes)
    assert first.refused == second.refused
    assert torch.equal(first.log_alpha, second.log_alpha)
    maps = [
        {
            name: [None if r is None else [m.tolist() for m in r.maps] for r in refs(layer)]
            for name, layer in t.packed.named_modules()
            if isinstance(layer, GatedLayer)
        }
        for t in (twins, again)
    ]
    assert maps[0] == maps[1]


def refs(layer: GatedLayer):
    return layer.in_gate, layer.out_gate


def test_conversion_leaves_parameters_and_buffers_alone(twins: oracle.Twins):
    before, after = twins.plain.state_dict(), twins.packed.state_dict()
    assert {n for n in after if not n.startswith("l0.")} == set(before)
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_the_small_and_the_full_network_have_the_same_kinds_of_layers():
    for found in zoo.entries():
        if found.available() and found.needs is None:
            small, full = ({type(m) for m in found.build(s).modules()} for s in ("small", "full"))
            assert small == full, found.name


def test_a_wrong_map_is_seen():
    exact = converted("densenet40").to(torch.float64)
    z = oracle.gate_values(gates_of(exact.packed).sizes, 5)
    masked, packed = exact.run_masked(z), exact.run_packed(z)
    assert max(oracle.relative_errors(masked, packed).values()) <= TOLERANCE
    exact.reads["classifier"] = lambda z, right=exact.reads["classifier"]: right(z).roll(1)
    assert max(oracle.relative_errors(exact.run_masked(z), packed).values()) > 1e-3


def test_statistics_of_closed_features_are_part_of_the_comparison():
    exact = converted("densenet40").to(torch.float64)
    z = oracle.gate_values(gates_of(exact.packed).sizes, 5)
    packed = exact.run_packed(z)
    del exact.makes["norm"]
    errors = oracle.relative_errors(exact.run_masked(z), packed)
    assert errors["buffer norm.running_mean"] > TOLERANCE
