# SPDX-License-Identifier: Apache-2.0
"""Importing the package is light, and works where the compiled library does not."""

import json

import pytest

HEAVY = ["triton", "matplotlib", "sklearn", "pandas", "PIL", "torch._inductor", "torch._dynamo"]

LIGHT = f"""
import json, sys, torch
before = set(sys.modules)
with open("/proc/self/maps") as maps:
    driver_before = "libcuda.so" in maps.read()
import l0kernels
new = set(sys.modules) - before
with open("/proc/self/maps") as maps:
    driver = "libcuda.so" in maps.read()
print(json.dumps({{
    "heavy": [name for name in {HEAVY} if name in new],
    "cuda": torch.cuda.is_initialized(),
    "driver": driver and not driver_before,
}}))
"""

UNLOADABLE = """
import dataclasses, torch
def refuse(path):
    raise OSError("undefined symbol: aoti_torch_something")
torch.ops.load_library = refuse
from l0kernels import _ext
for name, library in _ext.LIBRARIES.items():  # a file that exists
    _ext.LIBRARIES[name] = dataclasses.replace(library, file=_ext._BUILD_INFO)
from l0kernels.functional import pack_weight
weight = torch.arange(6.0).reshape(3, 2)
for rows in ([0, 2], [1]):
    rows = torch.tensor(rows)
    packed = pack_weight(weight, rows=rows, row_map=torch.full((2, 3), 1), z=torch.ones(2))
    assert torch.equal(packed, weight[rows]), packed
print(_ext.why_not(), _ext.load("cuda"), sep="\\n")
"""


def test_import_is_light(python):
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"heavy": [], "cuda": False, "driver": False}


NO_TRITON = """
import sys
sys.modules["triton"] = None
import l0kernels as l0
print(l0.info()["ops"]["pack_weight"]["triton"]["reason"])
l0.use_impl("triton")
"""


@pytest.mark.parametrize("asked", ["cuda", "triton"])
def test_import_is_light_whatever_is_asked_for(python, asked):
    done = python("-c", LIGHT, L0K_IMPL=asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"heavy": [], "cuda": False, "driver": False}


def test_info_does_not_import_triton(python):
    code = "import sys, l0kernels; l0kernels.info(); print('triton' in sys.modules)"
    done = python("-c", code)
    assert done.stdout == "False\n", done.stderr


def test_everything_but_triton_works_without_it(python):
    done = python("-c", NO_TRITON)
    assert done.stdout == "Triton is not installed (pip install triton)\n"
    assert done.stderr.endswith(
        "RuntimeError: implementation 'triton' was asked for but cannot run: "
        "Triton is not installed (pip install triton)\n"
    )


def test_library_of_another_torch_is_explained_once_and_ops_still_work(python):
    done = python("-c", UNLOADABLE)
    assert done.returncode == 0, done.stderr
    reasons = done.stdout.splitlines()
    assert len(reasons) == 2
    for reason in reasons:
        assert "undefined symbol" in reason
        assert "built for torch" in reason and "found" in reason
    assert done.stderr.count("C++ CPU ops") == 1
