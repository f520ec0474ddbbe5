# SPDX-License-Identifier: Apache-2.0
"""What other parts of the library ask of a gated layer: its plain class, widths, sizes."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import l0kernels as l0
from l0kernels.nn import gated_class

PLAIN = {
    nn.Linear: lambda: nn.Linear(3, 5),
    nn.Conv1d: lambda: nn.Conv1d(3, 5, 7),
    nn.Conv2d: lambda: nn.Conv2d(3, 5, (2, 7)),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(3, 5, (2, 7)),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(5),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(5),
    nn.PReLU: lambda: nn.PReLU(5),
}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("plain", PLAIN)
def test_layers_are_swapped_there_and_back(plain: type[nn.Module]):
    layer = PLAIN[plain]()
    gated = gated_class(plain)
    assert gated is not None and gated.plain_class is plain and issubclass(gated, plain)
    layer.__class__ = gated
    assert layer.gates is None
    sizes = {1: (5, 1, 1), 2: (5, 3, 1), 3: (5, 3, 7), 4: (5, 3, 14)}
    assert layer.shape_out_in() == sizes[layer.weight.dim()]
    layer.__class__ = layer.plain_class
    assert type(layer) is plain


def test_only_exact_classes_are_looked_up():
    class Other(nn.Linear):
        pass

    for cls in (Other, nn.Conv3d, nn.ReLU, nn.LayerNorm, gated_class(nn.Linear)):
        assert gated_class(cls) is None


def test_a_norm_without_parameters_has_a_size():
    norm = l0.nn.GatedBatchNorm1d(5, affine=False)
    assert norm.shape_out_in() == (5, 1, 1)


def test_depthwise_sizes_and_widths():
    for cls in (l0.nn.GatedConv1d, l0.nn.GatedConv2d, l0.nn.GatedConvTranspose2d):
        layer = cls(6, 6, 3, groups=6)
        assert layer.shape_out_in()[:2] == (6, 1)
        assert layer.weight.numel() == 6 * layer.shape_out_in()[2]
        layer.resize(2, 2)
        assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 2, 2)


@pytest.mark.parametrize("cls", [l0.nn.GatedConv1d, l0.nn.GatedConvTranspose2d])
def test_grouped_convolutions_are_refused(cls: type[nn.Module]):
    g = l0.gates.HardConcrete({"a": 6})
    with pytest.raises(ValueError, match=f"{cls.__name__}: expected groups=1, .* got groups=2"):
        cls(4, 6, 1, groups=2, out_gate=g["a"])
    with pytest.raises(ValueError, match="depthwise convolution with out_gate only"):
        cls(6, 6, 1, groups=6, in_gate=g["a"])


def test_one_slope_for_all_channels_takes_no_gate():
    g = l0.gates.HardConcrete({"a": 6})
    with pytest.raises(ValueError, match="GatedPReLU: expected out_gate of 1 features, got 6"):
        l0.nn.GatedPReLU(out_gate=g["a"])


def test_output_size_of_a_transposed_convolution():
    g = l0.gates.HardConcrete({"a": 4})
    net = nn.Sequential(
        l0.nn.GatedConv2d(2, 4, 1, out_gate=g["a"]),
        l0.nn.GatedConvTranspose2d(4, 3, 3, stride=3, in_gate=g["a"]),
    )
    g.attach(net).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for size in ((12, 14), (13, 13)):
        found = []
        for impl in ("reference", "auto"):
            with l0.use_impl(impl), g.using(torch.tensor([0.5, 0, 0.2, 0]).double()):
                found.append(net[1](net[0](x), output_size=size))
        assert found[1].shape == (2, 3, *size)
        torch.testing.assert_close(found[1], found[0])
    with pytest.raises(ValueError, match="valid sizes range"), g.using(torch.ones(4).double()):
        net[1](net[0](x), output_size=(50, 50))


@pytest.mark.parametrize("position", ["producer", "reader"])
def test_unit_weights_of_a_transposed_convolution(position: str):
    """A unit's filter where it is made: in x kh x kw; multiplied once per input position."""
    g = l0.gates.HardConcrete({"a": 4})
    if position == "producer":
        layers = [
            l0.nn.GatedConvTranspose2d(3, 4, (2, 5), stride=(1, 2), out_gate=g["a"]),
            nn.ReLU(),
            l0.nn.GatedLinear(4, 9, in_gate=g["a"]),
        ]
    else:
        layers = [
            l0.nn.GatedLinear(9, 4, out_gate=g["a"]),
            nn.ReLU(),
            l0.nn.GatedConvTranspose2d(4, 3, (2, 5), stride=(1, 2), in_gate=g["a"]),
        ]
    g.attach(nn.Sequential(*layers), {"0": 60, "2": 60})
    assert g.unit_weights.tolist() == [3 * 10] * 4
    assert g.unit_flops is not None and g.unit_flops.tolist() == [3 * 10 * 30] * 4


def test_unit_weights_of_conv1d_are_its_filters():
    g = l0.gates.HardConcrete({"a": 4})
    first = l0.nn.GatedConv1d(3, 4, 5, out_gate=g["a"])
    second = l0.nn.GatedConv1d(4, 9, 7, in_gate=g["a"])
    g.attach(nn.Sequential(first, second), {"0": 10, "1": 20})
    assert g.unit_weights.tolist() == [15] * 4
    assert g.unit_flops is not None and g.unit_flops.tolist() == [150] * 4


class TestTransformersConv1D:
    @pytest.fixture(autouse=True)
    def plain(self):
        return pytest.importorskip("transformers.pytorch_utils").Conv1D

    def test_swap_sizes_and_widths(self, plain: type[nn.Module]):
        gated = gated_class(plain)
        assert gated is l0.nn.hf.GatedConv1D and gated.plain_class is plain
        layer = plain(5, 3)
        layer.__class__ = gated
        assert layer.shape_out_in() == (5, 3, 1)
        assert layer(torch.ones(2, 3)).shape == (2, 5)
        layer.resize(2, 4)
        assert (layer.nx, layer.nf) == (2, 4)

    def test_unit_weights_are_the_columns_that_read(self, plain: type[nn.Module]):
        g = l0.gates.HardConcrete({"a": 4})
        gated = l0.nn.hf.GatedConv1D
        g.attach(nn.Sequential(gated(4, 9, out_gate=g["a"]), gated(6, 4, in_gate=g["a"])))
        assert g.unit_weights.tolist() == [6] * 4

    def test_pickle_and_deepcopy_find_the_class(self, plain: type[nn.Module]):
        gated = l0.nn.hf.GatedConv1D
        assert pickle.loads(pickle.dumps(gated)) is gated
        layer = copy.deepcopy(gated(5, 3))
        assert type(layer) is gated

    def test_the_class_is_found_by_name_in_a_new_process(self, plain: type[nn.Module]):
        code = "import pickle; print(pickle.loads(%r).__qualname__)"
        assert run_python(code % pickle.dumps(l0.nn.hf.GatedConv1D)) == "GatedConv1D\n"

    def test_wrong_width_says_expected_and_got(self, plain: type[nn.Module]):
        g = l0.gates.HardConcrete({"a": 4})
        gated = l0.nn.hf.GatedConv1D
        net = nn.Sequential(gated(4, 9, out_gate=g["a"]), gated(6, 4, in_gate=g["a"]))
        g.attach(net)
        with (
            g.using(torch.tensor([1.0, 0, 1, 1])),
            pytest.raises(ValueError, match="GatedConv1D: expected 3 input features, got 4"),
        ):
            net[1](torch.randn(2, 4))


def test_nothing_imports_transformers():
    code = (
        "import sys, torch, l0kernels, l0kernels.nn.hf as hf;"
        "print(l0kernels.nn.gated_class(torch.nn.ReLU), 'transformers' in sys.modules)"
    )
    assert run_python(code) == "None False\n"


def test_the_module_of_transformers_layers_is_there_after_one_import():
    code = "import sys, l0kernels as l0; print(l0.nn.hf.__name__, 'transformers' in sys.modules)"
    assert run_python(code) == "l0kernels.nn.hf False\n"


def test_the_module_has_no_other_names():
    from l0kernels.nn import hf

    with pytest.raises(AttributeError, match="has no attribute 'GatedConv2D'"):
        _ = hf.GatedConv2D
