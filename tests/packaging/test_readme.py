# SPDX-License-Identifier: Apache-2.0
"""The code in the README runs as printed."""

import re
from functools import partial

import error_table
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


@pytest.fixture
def code(root):
    return re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def names():
    """What the README's reader is assumed to have: a network, a batch, a loader."""
    x, y = torch.randn(4, 1, 28, 28), torch.randint(10, (4,))
    net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 576, 10))
    return {"net": net, "x": x, "data": range(60), "loader": [(x, y)] * 2}


def test_convert_and_train(code, names, capsys):
    before = names["net"][0].weight.clone()
    exec(code[0], names)
    assert names["net"].l0.log_alpha.shape == (8,)
    assert not torch.equal(names["net"][0].weight, before)
    assert torch.isfinite(names["loss"])
    assert "expected open" in capsys.readouterr().out


def test_hugging_face_models(code, names):
    names["transformers"] = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    names["config"] = names["transformers"].LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    names["ids"] = torch.randint(24, (2, 5))
    exec("import l0kernels as l0\n" + code[1], names)
    assert names["net"].l0.names == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.self_attn.o_proj.heads",
    ]


def test_compact_save_load_and_export(code, names, tmp_path, monkeypatch):
    for module in ("safetensors", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    names["Net"] = lambda: nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 576, 10)
    )
    exec(code[0] + code[2], names)
    net, x = names["net"].eval(), names["x"]
    assert names["small"][0].weight.shape[0] == net.l0.open_now()["0"]
    torch.testing.assert_close(names["small"].eval()(x), net(x))
    assert (tmp_path / "small.onnx").exists()


def test_layers_wired_by_hand(code, names):
    exec(code[0] + code[3], names)
    net, x = names["net"], names["x"]
    loss = names["l0"].expected_loss(net, lambda: net(x).square().mean())
    loss.backward()
    assert net(x).shape == (4, 10)
    assert names["g"].log_alpha.grad.abs().sum() > 0


def test_a_target_for_the_density(code, names):
    exec(code[0] + code[4], names)
    assert int(names["budget"].step) == 2
    assert float(names["budget"].level()) == pytest.approx(1 - 0.7 * 2 / 1000)


@pytest.mark.parametrize("method", ["hard_concrete", "arm", "dep", "cs"])
@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_averages_have_no_bias(code, names, method, decay):
    """sum_k (1 - decay) decay^(t - k) value_k / (1 - decay^t), started at zero."""
    exec(code[0].replace("hard_concrete", method), names)
    exec(code[5], names)
    assert int(names["ema"].n_averaged) == 2
    net, x = names["net"], names["x"]
    ema = AveragedModel(net, avg_fn=partial(names["update"], decay=decay))
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}
    for t in range(1, 8):
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.add_(0.1 * torch.randn_like(p))
                sums[name].mul_(decay).add_(p.double(), alpha=1 - decay)
        ema.update_parameters(net)
        for name, p in ema.module.named_parameters():
            expected = (sums[name] / (1 - decay**t)).to(p.dtype)
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert not ema.module.l0.log_alpha.equal(net.l0.log_alpha)
    ema.eval()
    y = ema(x)
    with names["l0"].use_impl("reference"):
        torch.testing.assert_close(ema(x), y, rtol=1e-4, atol=1e-4)
    small = names["l0"].compact(ema, (x,))
    torch.testing.assert_close(small(x), y, rtol=1e-4, atol=1e-4)


def test_captured_steps(code, names):
    exec(code[0], names)
    exec(code[6], names)
    assert int(names["net"].l0.step) == 4 and torch.isfinite(names["loss"])


def test_errors_are_those_that_were_recorded(root):
    files = sorted(root.glob("bench/results/*-tests.json"))
    if not files:
        pytest.skip("bench/results is not part of a source distribution")
    text = (root / "README.md").read_text()
    assert error_table.put_into(text, error_table.markdown(error_table.load(files))) == text
