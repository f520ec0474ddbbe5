# SPDX-License-Identifier: Apache-2.0
"""`l0kernels info` says what is installed, built and available."""

import json
import platform
from importlib import metadata

import pytest
import torch

import l0kernels
from l0kernels import _ext, _registry
from l0kernels._version import __version__
from l0kernels.cli import main


@pytest.fixture
def facts(capsys):
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_versions(facts):
    assert facts["versions"]["l0kernels"] == __version__ == metadata.version("l0kernels")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["numpy"] == metadata.version("numpy")
    assert set(facts["versions"]) >= {"triton", "cuda"}


def test_system(facts, monkeypatch, capsys):
    assert facts["system"]["threads"] == torch.get_num_threads()
    assert facts["system"]["cpu"] and facts["system"]["os"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    main(["info", "--json"])
    assert json.loads(capsys.readouterr().out)["system"]["OMP_WAIT_POLICY"] == "active"


def test_build(facts):
    assert facts["build"]["loaded"] is _ext.cpp_available()
    assert bool(facts["build"]["why_not"]) is not _ext.cpp_available()
    assert facts["build"]["cuda_loaded"] is not bool(_ext.load("cuda"))
    assert facts["build"]["cuda_why_not"] == _ext.load("cuda")
    recorded = {"L0K_BUILD", "cpp", "math", "torch", "target_version", "compiler", "flags", "git"}
    recorded |= {"cuda", "cuda_reason", "nvcc", "architectures", "cuda_flags"}
    assert set(facts["build"]) >= recorded


def test_every_op_says_what_can_run_it(facts):
    assert {"sample_gates", "pack_weight"} <= set(facts["ops"]) == set(_registry.OPS)
    for impls in facts["ops"].values():
        assert set(impls) == {"reference", "cpp", "triton", "cuda"}
        assert impls["reference"] == {"available": True, "reason": ""}
        assert _ext.cpp_available() or not impls["cpp"]["available"]
        assert torch.cuda.is_available() or not impls["cuda"]["available"]
        for state in impls.values():
            assert state["available"] is not bool(state["reason"])


def test_table_names_what_json_names(facts, capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for op in facts["ops"]:
        assert f"op {op}" in text
    assert torch.__version__ in text
    assert ", ".join(facts["build"]["architectures"]) in text


def test_command_prints_json(python):
    done = python("-m", "l0kernels.cli", "info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(l0kernels.info()))
