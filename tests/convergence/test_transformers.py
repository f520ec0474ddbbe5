# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models convert in three lines, with MLP neurons and heads gated, and they train."""

import copy

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

STEPS = 60


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """Images of four kinds: noise around a prototype."""
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=4,
    )
    labels = torch.arange(16) % 4
    images = torch.randn(4, 3, 16, 16)[labels] + 0.5 * torch.randn(16, 3, 16, 16)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": images,
        "labels": labels,
    }


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Sequences that count up; two query heads share a key-value head."""
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    ids = (torch.randint(24, (16, 1)) + torch.arange(8)) % 24
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


KINDS = {
    "vit": (vit, "vit.layers.{}.mlp.fc1", "vit.layers.{}.attention.o_proj.heads"),
    "llama": (llama, "model.layers.{}.mlp.gate_proj", "model.layers.{}.self_attn.o_proj.heads"),
}


def train(net: nn.Module, batch: dict[str, Tensor], impl: str) -> list[float]:
    optimizer = torch.optim.Adam(l0.param_groups(net, lr=3e-3, gate_lr=0.02))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with l0.use_impl(impl):
            loss = l0.expected_loss(net, lambda: net(**batch).loss)
            (loss + l0.penalty(net)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_three_lines_and_it_trains(kind: str):
    torch.manual_seed(0)
    build, *groups = KINDS[kind]
    net, batch = build()
    kinds = l0.select.inner | l0.select.heads
    l0.convert(
        net, "hard_concrete", example_inputs=batch, select=kinds, lam=0.05, n_train=1000, seed=0
    )
    assert net.l0.names == [group.format(i) for group in groups for i in range(2)]
    masked = copy.deepcopy(net)
    ours = torch.tensor(train(net, batch, "auto"))
    theirs = torch.tensor(train(masked, batch, "reference"))
    print(f"{kind}: loss {ours[:5].mean():.3f} at first, {ours[-10:].mean():.3f} at last")
    assert ours[-10:].mean() < 0.5 * ours[:5].mean()
    torch.testing.assert_close(
        ours.view(-1, 10).mean(1), theirs.view(-1, 10).mean(1), rtol=0.02, atol=1e-3
    )
    small = l0.compact(net, batch)
    net.eval()
    with torch.no_grad():
        expected, got = net(**batch).logits, small.eval()(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())
