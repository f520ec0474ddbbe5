# SPDX-License-Identifier: Apache-2.0
"""Importing the package is light, and works where the compiled library does not."""

import json

HEAVY = ["triton", "matplotlib", "sklearn", "pandas", "PIL", "torch._inductor", "torch._dynamo"]

LIGHT = f"""
import json, sys, torch
before = set(sys.modules)
import l0kernels
new = set(sys.modules) - before
print(json.dumps({{
    "heavy": [name for name in {HEAVY} if name in new],
    "cuda": torch.cuda.is_initialized(),
}}))
"""

UNLOADABLE = """
import torch
def refuse(path):
    raise OSError("undefined symbol: aoti_torch_something")
torch.ops.load_library = refuse
from l0kernels import _ext
_ext._LIBRARY = _ext._BUILD_INFO  # a file that exists
from l0kernels.functional import pack_weight
weight = torch.arange(6.0).reshape(3, 2)
for rows in ([0, 2], [1]):
    rows = torch.tensor(rows)
    packed = pack_weight(weight, rows=rows, row_map=torch.full((2, 3), 1), z=torch.ones(2))
    assert torch.equal(packed, weight[rows]), packed
print(_ext.why_not())
"""


def test_import_is_light(python):
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"heavy": [], "cuda": False}


def test_library_of_another_torch_is_explained_once_and_ops_still_work(python):
    done = python("-c", UNLOADABLE)
    assert done.returncode == 0, done.stderr
    assert "undefined symbol" in done.stdout
    assert "built for torch" in done.stdout and "found" in done.stdout
    assert done.stderr.count("C++ CPU ops") == 1
