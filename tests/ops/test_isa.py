# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels give the same bits with every instruction set they are compiled for."""

import os
import subprocess
import sys

SCRIPT = """
import hashlib
import torch
from l0kernels.functional import GateLayout, dep_chain, gate_apply, masked_weight, pack_weight
from l0kernels.functional import packed_norm, sample_gates
from l0kernels.ops.adam_rows import adam_rows, adam_rows_catch_up
from l0kernels.ops.sgd_rows import sgd_rows, sgd_rows_catch_up

digest = hashlib.sha256()

def add(*tensors):
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

def numbers(*shape):  # PyTorch's own random numbers depend on the instruction set
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 % 10007).double() / 10007 * 6 - 3).reshape(shape)

gates = 3001
offsets = torch.tensor([0, gates])
maps = torch.stack([torch.arange(gates), torch.full((gates,), gates)])
layout = GateLayout(offsets, maps, offsets)
for law in ("hard_concrete", "bernoulli", "antithetic"):
    for dtype in (torch.float32, torch.float64):
        log_alpha = numbers(gates).to(dtype).requires_grad_()
        cost = numbers(gates).abs().to(dtype)
        z, expected, lists = sample_gates(log_alpha, torch.tensor([3, 4]), cost, layout, law)
        add(z, expected, *lists, *torch.autograd.grad([z.sum(), expected], log_alpha))

for dtype in (torch.float32, torch.float64):
    parts = [numbers(61), numbers(37, 61), numbers(29, 37) / 9, numbers(37), numbers(29)]
    first, *parts = [part.to(dtype).requires_grad_() for part in parts]
    logits = dep_chain(first, parts[:2], parts[2:])
    add(logits, *torch.autograd.grad(logits, [first, *parts], numbers(66).to(dtype)))

gates_of = lambda first, count: torch.stack([torch.arange(first, first + count)] * 2)
rows, cols = torch.arange(37)[::3].contiguous(), torch.arange(29)[1::2].contiguous()
f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
for source, target in (
    (f64, f64), (f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f16, f16)
):
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = numbers(37, 29, 3, 3).to(source).to(memory_format=layout).requires_grad_()
        z = numbers(67).to(f64 if source == f64 else f32).requires_grad_()
        maps = rows, gates_of(0, 37), cols, gates_of(37, 29)
        packed = pack_weight(weight, z, *maps, target)
        upstream = numbers(*packed.shape).to(target)
        add(packed, *torch.autograd.grad(packed, (weight, z), upstream))
        scores = numbers(37, 29, 3, 3).flip(0).to(z.dtype).requires_grad_()
        masked = masked_weight(weight, scores, z.new_tensor(40), 1.9, dtype=target)
        upstream = numbers(37, 29, 3, 3).flip(1).to(target)
        add(masked, *torch.autograd.grad(masked, (weight, scores), upstream))

index, gates = torch.arange(67)[1::3].contiguous(), torch.ones(68)
gates[index[4]] = 0
for dtype in (f64, f32, bf16, f16):
    for shape in ((5000, 22), (3, 22, 37, 11), (3, 22, 2, 3)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = numbers(*shape).to(dtype)
            x = x.to(memory_format=layout) if x.dim() == 4 else x
            own = dtype if dtype == f64 else f32
            leaves = [x, numbers(67).to(own), numbers(67).to(own).flip(0)]
            running = torch.zeros(67, dtype=own), torch.ones(67, dtype=own)
            for training in (True, False):
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                maps = index, gates.to(own), gates_of(0, 67)
                y = packed_norm(*leaves, *running, *maps, training, activation="relu")
                add(y, *running, *torch.autograd.grad(y, leaves, numbers(*shape).to(dtype)))
            for z in (numbers(23).to(own), numbers(23 * len(x)).reshape(len(x), 23).to(own)):
                leaves = [x.detach().requires_grad_(), z.requires_grad_()]
                y = gate_apply(*leaves, gates_of(0, 22))
                add(y, *torch.autograd.grad(y, leaves, numbers(*shape).to(dtype)))

for dtype in (f64, f32):
    state = [numbers(37, 101).to(dtype) for _ in range(3)]
    weight, mean, square = state[0], state[1].flip(0), state[2].square()
    grad, last = numbers(37, 101).to(dtype), torch.arange(37) % 4
    adam = torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.1]] * 3, dtype=f64)
    adam_rows_catch_up(weight, mean, square, last, None, adam, 3, number=9, mark=4)
    adam_rows(weight, mean, square, grad, last, 3, number=10, lr=0.1, weight_decay=0.1)
    add(weight, mean, square)
    last = torch.arange(37) % 4
    sgd_rows_catch_up(weight, mean, last, None, numbers(4, 2, 2), 3, 4)
    sgd_rows(weight, mean, grad, last, 3, lr=0.1, momentum=0.9, nesterov=True)
    add(weight, mean)
print(digest.hexdigest())
"""


def digest(capability):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "L0K_IMPL": "cpp"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_bits_do_not_depend_on_the_instruction_set(need_cpp):
    digests = {name: digest(name) for name in ("default", "avx2", "avx512")}
    assert len(digests["default"]) == 64
    assert set(digests.values()) == {digests["default"]}
