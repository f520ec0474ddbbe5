# SPDX-License-Identifier: Apache-2.0
"""The operators' CUDA sources under sanitizers and in many orders of threads.

The operators' own tests run once more under AddressSanitizer and UndefinedBehaviorSanitizer, and
leave the calls they made; these run again here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import build, calls, ops
from harness.build import ROOT

STEMS = [stem for stem in ops.stems() if ops.has_source(stem)]
MOST_CALLS = 60  # of one operator
# Statistics of millions of draws say nothing about memory.
TESTS = "harness and not million and not statistics and not activity and not refused"


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The run of the operators' tests with sanitizers, and the file with their calls."""
    if build.why_not():
        pytest.skip(f"CUDA sources cannot run on this CPU: {build.why_not()}")
    recorded = tmp_path_factory.mktemp("recorded") / "calls.pt"
    environment = {"L0K_HARNESS_SANITIZE": "address", "L0K_HARNESS_RECORD": str(recorded)}
    # Captured in Python only: what a sanitizer writes before it ends the process must get through.
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys", "-k", TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/ops"],
        cwd=ROOT,
        env=os.environ | build.preload("address") | environment,
        capture_output=True,
        text=True,
    )
    return done, recorded


@pytest.fixture(params=STEMS)
def stem(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recorded(checked, stem) -> list[calls.Call]:
    """Calls of one operator; of too many, every second, third or so."""
    names = [ops.raw_name(handle) for _, handle, *_ in ops.raw_ops(stem)]
    made = [call for call in calls.load(checked[1]) if call[0] in names]
    assert {name for name, _ in made} == set(names)
    return made[:: -(-len(made) // MOST_CALLS)]


def test_operators_pass_their_tests_under_sanitizers(checked):
    done, _ = checked
    assert done.returncode == 0, done.stdout + done.stderr


def test_threads_do_not_race(stem, recorded, tmp_path):
    library = ops.library(stem, "thread")
    done = calls.replay(ops.schemas(stem), recorded, [library], "thread", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name for name, _ in recorded]
    assert done.stderr == ""


def results(call: calls.Call, seed: int) -> list[Tensor]:
    """What a call returns and what it changes, under one order of threads."""
    name, args = call
    ops.set_schedule(seed)
    mine = calls.copy_of(args)
    returned = getattr(getattr(torch.ops, ops.NAMESPACE), name).default(*mine)
    return calls.tensors([returned, *mine])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_every_order_of_threads_gives_the_same_bits(stem, recorded):
    ops.load(stem)
    for call in recorded:
        first = results(call, -1)
        for seed in range(3):
            for one, other in zip(first, results(call, seed), strict=True):
                assert torch.equal(bits(one), bits(other))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_opcheck(stem, recorded):
    ops.load(stem)
    seen = set()
    for name, args in reversed(recorded):
        if name not in seen:
            seen.add(name)
            torch.library.opcheck(getattr(getattr(torch.ops, ops.NAMESPACE), name).default, args)
