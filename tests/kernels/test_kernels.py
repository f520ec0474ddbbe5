# SPDX-License-Identifier: Apache-2.0
"""`make kernels` reads resources right and fails where it must."""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from kernels import __main__ as command
from kernels import cuda_aot, sass, table
from kernels.table import Row, Skipped

CLEAN = """
#include <cstdint>
namespace l0k {
namespace {
template <int N, typename T>
__global__ void __launch_bounds__(N) reverse(const float4* from, float4* to) {
  __shared__ float4 tile[N];
  tile[threadIdx.x] = from[blockIdx.x * N + threadIdx.x];
  __syncthreads();
  to[blockIdx.x * N + threadIdx.x] = tile[N - 1 - threadIdx.x];
}
}  // namespace
void run(const float4* from, float4* to) { reverse<96, int64_t><<<4, 96>>>(from, to); }
}  // namespace l0k
"""
# 100 numbers alive at a time, where 1024 threads leave 64 registers to each.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) hoard(const float* from, float* to, int n) {
  float kept[100];
  for (int i = 0; i < 100; ++i) kept[i] = from[i * 1024 + threadIdx.x];
  for (int turn = 0; turn < n; ++turn) {
    for (int i = 0; i < 100; ++i) kept[i] = kept[i] * kept[(i + 37) % 100] + from[turn];
  }
  for (int i = 0; i < 100; ++i) to[i * 1024 + threadIdx.x] = kept[i];
}
"""
UNBOUNDED = 'extern "C" __global__ void free_size(float* x) { x[threadIdx.x] = 0; }\n'

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4352 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twov' for 'sm_80'
ptxas info    : Function properties for _Z3twov
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperv
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
PTX = """
.visible .entry _Z3onev(
\t.param .align 8 .b8 _Z3onev_param_0[72]
)
.maxntid 64, 4, 1
.minnctapersm 2
{
}
.visible .entry _Z3twov()
{
}
.weak .entry _Z5threev(
\t.param .u64 _Z5threev_param_0
)
.maxntid 256
{
	mov.u64 %rd1, l0k_dynamic_shared;
}
"""
SASS = """
\t\tFunction : _Z3onev
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
                                                                          /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;                /* 0x0000000402048981 */
        /*0020*/                   LDG.E.CONSTANT R8, [R2.64] ;           /* 0x0000000402048981 */
        /*0030*/               @P1 HMMA.16816.F32.BF16 R4, R4, R6, R4 ;   /* 0x0000000402048981 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R2.64] ;    /* 0x0000000402048981 */
        /*0050*/               @P1 HMMA.16816.F32.BF16 R4, R4, R6, R4 ;   /* 0x0000000402048981 */
\t\tFunction : _Z3twov
        /*0000*/                   EXIT ;                                 /* 0x000000000000794d */
        /*12340*/             @UP0 HGMMA.64x128x16.F32.BF16 R24, gdesc ;  /* 0x000000000000794d */
"""


def test_what_ptxas_says():
    found = cuda_aot.parse_ptxas(PTXAS)
    assert found["_Z3onev"] == cuda_aot.Resources(registers=40, spilled=0, shared=4352)
    assert found["_Z3twov"] == cuda_aot.Resources(registers=255, spilled=20, shared=0)
    assert found["_Z6helperv"].spilled == 8


def test_threads_by_launch_bounds():
    entry = cuda_aot.Entry
    assert cuda_aot.parse_ptx(PTX) == {
        "_Z3onev": entry(256, dynamic=False),
        "_Z3twov": entry(None, dynamic=False),
        "_Z5threev": entry(256, dynamic=True),
    }


def test_instructions():
    assert sass.count(SASS) == {
        "_Z3onev": {"HMMA": 2, "LDG": 1, "LDG.128": 1, "LDGSTS": 1},
        "_Z3twov": {"HGMMA": 1},
    }


def test_names():
    assert (
        cuda_aot.shorten("void l0k::(anonymous namespace)::pack<(int)4, float, (bool)1>")
        == "pack<4, float, 1>"
    )


def row(**changes):
    made = {
        "backend": "cuda",
        "source": "csrc/cuda/a.cu",
        "kernel": "a",
        "config": "",
        "arch": "sm_80",
        "threads": 256,
        "registers": 32,
        "spilled": 0,
        "shared": 0,
    }
    return Row(**(made | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spilled": 4}, "a on sm_80: spills 4 bytes"),
        ({"shared": 1 << 20}, "a on sm_80: a block does not fit on a multiprocessor"),
        ({"problems": ("has no HGMMA",)}, "a on sm_80: has no HGMMA"),
    ],
)
def test_defects(changes, text):
    assert row().defects() == []
    assert row(**changes).defects() == [text]


def test_occupancy_is_unknown_on_other_gpus():
    assert row().occupancy == 1.0
    assert row(registers=255).occupancy == 8 / 64
    assert row(arch="gfx942").occupancy is None
    assert "| gfx942 | 256 | 32 | 0 | 0 |  |  |  |" in table.markdown([row(arch="gfx942")])


@pytest.fixture
def parts(monkeypatch):
    """Lets a test say what the parts of the command find."""

    class Part:
        def __init__(self, rows):
            self.rows = rows

    modules = {}
    monkeypatch.setattr(command, "PARTS", {name: name for name in ("CUDA", "Triton")})
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command.importlib, "import_module", lambda name: Part(modules[name]))
    return modules


def skip(reason):
    def rows():
        raise Skipped(reason)

    return rows


@pytest.mark.parametrize(("spilled", "code"), [(0, 0), (8, 1)])
def test_command_fails_on_a_spill(parts, tmp_path, capsys, spilled, code):
    parts["CUDA"] = lambda: [row(), row(arch="sm_100", spilled=spilled)]
    parts["Triton"] = skip("not installed: skipped")
    assert command.main(["--out", str(tmp_path / "out")]) == code
    printed = capsys.readouterr().out
    assert "Triton: not installed: skipped" in printed
    assert ("FAILED: a on sm_100: spills 8 bytes" in printed) is bool(code)
    assert "| a |  | sm_100 | 256 | 32 |" in (tmp_path / "out" / "table.md").read_text()
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [found["occupancy"] for found in written["rows"]] == [1.0, 1.0]
    assert [bool(found["defects"]) for found in written["rows"]] == [False, bool(code)]


def test_command_fails_where_a_part_does(parts, tmp_path, capsys):
    def rows():
        raise RuntimeError("nvcc is here, but csrc/cuda has no kernel")

    parts.update(CUDA=rows, Triton=lambda: [row()])
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "FAILED: CUDA: nvcc is here, but" in capsys.readouterr().out


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles sources of its own for every architecture: {(kernel, arch): row}."""
    build = cuda_aot.build_script()
    if build.why_not_cuda():
        pytest.skip(build.why_not_cuda())
    if sass.cuobjdump() is None:
        pytest.skip("cuobjdump not found: triton has it")

    def run(**sources):
        (tmp_path / "csrc" / "cuda").mkdir(parents=True)
        for name, text in sources.items():
            (tmp_path / "csrc" / "cuda" / f"{name}.cu").write_text(text)
        return {(found.kernel, found.arch): found for found in cuda_aot.rows(tmp_path)}

    return run


def test_kernels_of_a_source(compiled):
    found = compiled(clean=CLEAN, spilling=SPILLING, unbounded=UNBOUNDED)
    arches = {"sm_80", "sm_90a", "sm_100"}
    assert {arch for _, arch in found} == arches and len(found) == 9
    for arch in arches:
        clean = found["reverse<96, long>", arch]
        assert clean.source == "csrc/cuda/clean.cu"
        assert (clean.threads, clean.shared, clean.spilled) == (96, 96 * 16, 0)
        assert 8 <= clean.registers <= 64 and clean.defects() == []
        assert clean.instructions["LDG.128"] == clean.instructions["STG.128"] == 1
        assert clean.instructions["BAR"] >= 1
        spilling = found["hoard", arch]
        assert spilling.spilled > 0 and spilling.registers == 64
        assert spilling.instructions["STL"] > 0
        assert "spills" in spilling.defects()[0]
        assert "no launch bounds" in found["free_size", arch].defects()[0]


def test_no_source_is_an_error(compiled):
    with pytest.raises(RuntimeError, match="nvcc is here, but csrc/cuda has no kernel"):
        compiled()


def test_error_in_a_source_is_shown(compiled):
    with pytest.raises(RuntimeError, match="(?s)bad.cu does not compile for sm_.*nonsense"):
        compiled(bad="nonsense\n")


def test_no_nvcc_is_said(monkeypatch):
    build = cuda_aot.build_script()
    monkeypatch.setattr(build, "nvcc", lambda: "")
    monkeypatch.setattr(cuda_aot, "build_script", lambda: build)
    with pytest.raises(Skipped, match="no nvcc: skipped"):
        cuda_aot.rows()


def triton_rows(arch):
    """{config: row} of the planted kernels, compiled in a process of its own."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    if sass.cuobjdump() is None:
        pytest.skip("cuobjdump not found: triton has it")
    from kernels import planted, triton_aot

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        rows = pool.submit(triton_aot.rows_of, arch, planted.CASES).result()
    return {row.config.partition(",")[0]: row for row in rows}


def test_triton_kernels_that_are_refused_on_hopper():
    found = triton_rows("sm_90a")
    assert found["good"].defects() == [] and found["good"].instructions["HGMMA"] >= 4
    assert found["float32"].defects() == [] and "HGMMA" not in found["float32"].instructions
    assert "HMMA" in found["short"].instructions
    assert "has no HGMMA" in found["short"].defects()[0]
    assert re.search(r"spills \d+ bytes", found["crowded"].defects()[0])
    assert found["crowded"].instructions["STL"] > 0
    assert "has atomics" in found["sum"].defects()[0]


def test_triton_kernels_on_other_gpus():
    found = triton_rows("sm_80")
    assert "HMMA" in found["good"].instructions
    assert found["good"].defects() == found["short"].defects() == []
    found = triton_rows("gfx942")
    assert "MFMA" in found["good"].instructions and found["good"].defects() == []
    assert "has atomics" in found["sum"].defects()[0]


def test_operators_without_cases_are_an_error(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    from kernels import triton_aot

    (tmp_path / "l0kernels" / "ops" / "new_op").mkdir(parents=True)
    (tmp_path / "l0kernels" / "ops" / "new_op" / "triton.py").touch()
    with pytest.raises(RuntimeError, match="no cases for the Triton kernels of new_op"):
        triton_aot.rows(tmp_path)
