# SPDX-License-Identifier: Apache-2.0
"""Blocks per multiprocessor, against NVIDIA's own header."""

import itertools
import shutil
import subprocess

import pytest
from kernels.cuda_aot import build_script
from kernels.occupancy import LIMITS, SHARED_SYSTEM, blocks_per_multiprocessor

# Reads "major shared_per_multiprocessor threads registers shared" lines, prints the blocks.
PROGRAM = r"""
#include <cuda_runtime_api.h>
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, per_multiprocessor, threads, registers, shared;
  while (std::scanf("%d %d %d %d %d", &major, &per_multiprocessor, &threads, &registers, &shared)
         == 5) {
    cudaOccDeviceProp gpu;
    gpu.computeMajor = major;
    gpu.maxThreadsPerBlock = 1024;
    gpu.maxThreadsPerMultiprocessor = 2048;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
    gpu.warpSize = 32;
    gpu.sharedMemPerBlock = 48 << 10;
    gpu.sharedMemPerMultiprocessor = per_multiprocessor;
    gpu.sharedMemPerBlockOptin = per_multiprocessor - 1024;
    gpu.reservedSharedMemPerBlock = 1024;
    gpu.numSms = 100;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.maxDynamicSharedSizeBytes = gpu.sharedMemPerBlockOptin;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(
        &result, &gpu, &kernel, &state, threads, shared);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


@pytest.fixture
def nvidia(tmp_path):
    """Compiles the program; gives a function from questions to answers."""
    build = build_script()
    if build.why_not_cuda() or shutil.which("g++") is None:
        pytest.skip(build.why_not_cuda() or "g++ is not installed")
    (tmp_path / "blocks.cpp").write_text(PROGRAM)
    program = tmp_path / "blocks"
    command = [build.nvcc(), "-cudart=none", str(tmp_path / "blocks.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)

    def ask(questions):
        lines = "\n".join(" ".join(map(str, question)) for question in questions)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    return ask


@pytest.mark.parametrize("arch", LIMITS)
def test_equal_to_the_header(nvidia, arch):
    most = LIMITS[arch].shared
    major = {"sm_80": 8, "sm_90a": 9}.get(arch, 10)
    sizes = [0, 1, 127, 1024, 5000, 16384, 49152, 73728, 100000, most // 2 - 1024, most - 1024]
    cases = list(itertools.product([32, 64, 96, 128, 160, 256, 384, 1024], range(1, 256), sizes))
    asked = nvidia([(major, most, *case) for case in cases])
    ours = [blocks_per_multiprocessor(arch, *case) for case in cases]
    wrong = [(case, a, b) for case, a, b in zip(cases, asked, ours, strict=True) if a != b]
    assert len(cases) > 10000 and wrong == []


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 32, 0, 8), (128, 255, 0, 2), (32, 16, 0, 32), (1024, 65, 0, 0), (128, 32, 1 << 20, 0)],
)
def test_known_cases(threads, registers, shared, blocks):
    assert blocks_per_multiprocessor("sm_80", threads, registers, shared) == blocks


def test_shared_memory_is_given_out_whole():
    room = LIMITS["sm_90a"].shared // 3 // 128 * 128 - SHARED_SYSTEM
    assert blocks_per_multiprocessor("sm_90a", 128, 32, room) == 3
    assert blocks_per_multiprocessor("sm_90a", 128, 32, room + 1) == 2
