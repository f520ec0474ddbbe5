# SPDX-License-Identifier: Apache-2.0
"""The harness runs correct kernels right and catches planted bugs."""

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness import build as building
from harness.build import HERE, ROOT, BuildError, build
from harness.calls import replay

SOURCE = HERE / "planted.cu"
SEEDS = range(20)
N = 64  # threads of a block


def positive_before(x):
    return torch.cat([torch.zeros(1), (x > 0).cumsum(0)[:-1]])


@dataclass
class Planted:
    """A kernel that exists with a bug and without."""

    x: torch.Tensor
    right: Callable[[torch.Tensor], torch.Tensor]

    @property
    def expected(self):
        return self.right(self.x)


def rounds(x):
    shifted = x.roll(-7)
    return (shifted + 0) + (shifted + 1) + (shifted + 2)


def reused_stage(x):
    first = x[::4]
    return (first.roll(-1) + first.roll(-2)).repeat_interleave(4)


def numbers(count):
    return torch.arange(1.0, count + 1)


PLANTED = {
    "reverse": Planted(numbers(N), lambda x: x.flip(0)),
    "reverse_warp": Planted(numbers(32), lambda x: x.flip(0)),
    "rounds": Planted(numbers(N), rounds),
    "last_block": Planted(numbers(8), lambda x: torch.cat([x.sum(0, keepdim=True), x[1:]])),
    "same_place": Planted(numbers(8), lambda x: x),
    "skipped_barrier": Planted(
        numbers(N), lambda x: x.view(2, 32).sum(1).flip(0).repeat_interleave(32)
    ),
    "two_barriers": Planted(numbers(N), lambda x: x),
    "other_masks": Planted(numbers(N), lambda x: x[::32].repeat_interleave(32)),
    "absent_lane": Planted(numbers(N), lambda x: x[3::32].repeat_interleave(32)),
    "write_dynamic": Planted(numbers(N), lambda x: x),
    "read_dynamic": Planted(numbers(N), lambda x: x),
    "write_static": Planted(numbers(N), lambda x: x),
    "read_static": Planted(numbers(N), lambda x: x),
    "write_global": Planted(numbers(40), torch.ones_like),
    "read_global": Planted(numbers(40), lambda x: x),
    "misaligned": Planted(numbers(4), lambda x: x),
    "unwritten": Planted(numbers(4 * N), lambda x: x[:N].repeat(4)),
    "missing_wait": Planted(numbers(4 * N), lambda x: x),
    "stages": Planted(numbers(4 * N + 130), lambda x: x),
    "reused_stage": Planted(numbers(4 * N), reused_stage),
    "shared_sizes": Planted(numbers(N), lambda x: x),
}
SCHEMAS = [
    *(f"{name}(Tensor x, bool bug) -> Tensor" for name in PLANTED),
    "launch(Tensor x, int blocks, int threads, int shared_bytes) -> Tensor",
    "add_product(Tensor a, Tensor b, Tensor d) -> Tensor",
    "scan(Tensor x, int threads) -> Tensor",
    "shuffles(Tensor x) -> Tensor",
    "atomics(Tensor x, int blocks) -> Tensor",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    if building.why_not():
        pytest.skip(f"CUDA sources cannot run on this CPU: {building.why_not()}")
    return ROOT / "build/harness"


@pytest.fixture(scope="module")
def library(folder):
    """The planted kernels: the library's own functions, and their operators."""
    path = build([SOURCE], folder / "plain/planted.so")
    registration = torch.library.Library("l0kernels_harness", "FRAGMENT")
    for schema in SCHEMAS:
        registration.define(schema)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.l0k_schedule.argtypes = [ctypes.c_int64]
    loaded.l0k_schedule(0)
    yield loaded
    registration._destroy()


@pytest.fixture
def op(library):
    return torch.ops.l0kernels_harness


def run(op, name, bug):
    return getattr(op, name)(PLANTED[name].x, bug)


# ---- correct kernels ----


@pytest.mark.parametrize("name", PLANTED)
def test_correct_kernels_are_right_in_every_order(library, op, name):
    for seed in (-1, *SEEDS):
        library.l0k_schedule(seed)
        assert torch.equal(run(op, name, False), PLANTED[name].expected)


def fragments(dtype, draw):
    return draw(16, 16).to(dtype), draw(16, 8).to(dtype), draw(16, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_products_are_the_exact_ones(op, dtype):
    whole = fragments(dtype, lambda *shape: torch.randint(-8, 9, shape).float())
    a, b, d = whole
    assert torch.equal(op.add_product(*whole), d + a.float() @ b.float())
    a, b, d = fragments(dtype, torch.randn)
    exact = d.double() + a.double() @ b.double()
    unit = torch.finfo(torch.float32).eps / 2
    bound = 17 * unit * (d.double().abs() + a.double().abs() @ b.double().abs())
    assert bool(((op.add_product(a, b, d) - exact).abs() <= bound).all())


@pytest.mark.parametrize("threads", [32, 64, 1024])
def test_scans_and_sums(op, threads):
    x = torch.randint(-5, 6, (2 * threads + 40,)).float()
    y = op.scan(x, threads)
    mine = x[:threads]
    assert torch.equal(y[:threads], positive_before(mine))
    assert y[threads] == threads
    assert torch.equal(y[threads + 1 : threads + 1 + threads // 32], mine.view(-1, 32).sum(1))


def test_shuffles(op):
    x = torch.cat([torch.arange(32.0), torch.zeros(200)])
    lane = torch.arange(32)
    from_one, in_eights, xor, up, down, ballot, votes = op.shuffles(x)[:224].view(7, 32).long()
    assert (from_one == 5).all()
    assert torch.equal(in_eights, lane // 8 * 8 + 5)
    assert torch.equal(xor, lane ^ 3)
    assert torch.equal(up, torch.where(lane % 16 >= 2, lane - 2, lane))
    assert torch.equal(down, torch.where(lane % 16 < 14, lane + 2, lane))
    assert (ballot == 24).all()
    assert (votes == 1).all()
    assert torch.equal(op.shuffles(x)[224:].long(), lane[:8] ^ 1)


def test_atomics(library, op):
    zeros = torch.zeros(4, dtype=torch.int32)
    for seed in SEEDS:
        library.l0k_schedule(seed)
        assert op.atomics(zeros, 3).tolist() == [3 * N, 3 * N - 1, 1 - 3 * N, 6 * N]


def test_launches_are_counted(library, op):
    library.l0k_launches(1)
    for _ in range(3):
        run(op, "reverse", False)
    assert library.l0k_launches(0) == 3
    assert library.l0k_launches(1) == 3
    assert library.l0k_launches(0) == 0


def test_one_seed_is_one_order(library, op):
    def results():
        library.l0k_schedule(7)
        return [run(op, "reverse", True) for _ in range(5)]

    first = results()
    assert len({tuple(y.nan_to_num(-1).tolist()) for y in first}) > 1
    for one, other in zip(first, results(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


# ---- planted bugs, without sanitizers ----


@pytest.mark.parametrize("name", ["reverse", "reverse_warp", "rounds", "reused_stage"])
def test_random_orders_show_missing_barriers(library, op, name):
    wrong = 0
    for seed in SEEDS:
        library.l0k_schedule(seed)
        wrong += not torch.equal(run(op, name, True), PLANTED[name].expected)
    assert wrong == len(SEEDS)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "skipped_barrier",
            r"deadlock: .*__syncthreads: 63 at planted.cu:\d+; .*: 1 at common.cuh",
        ),
        ("two_barriers", r"different __syncthreads: 32 at planted.cu:\d+, 32 at planted.cu:\d+"),
        ("other_masks", r"with different masks: planted.cu:\d+ and planted|does not take part"),
        ("absent_lane", r"planted.cu:\d+: lane \d+ reads from lane 3, which does not take part"),
        ("write_dynamic", r"past the end of shared memory: 'dynamic shared memory', 256 bytes"),
        ("write_static", r"past the end of shared memory: 'tile', 256 bytes, at byte 256"),
        ("misaligned", "misaligned address"),
        ("shared_sizes", "at most 48 KiB of static"),
    ],
)
def test_errors_say_what_is_wrong(library, op, name, message):
    for seed in (-1, *SEEDS):
        library.l0k_schedule(seed)
        with pytest.raises(RuntimeError, match=message):
            run(op, name, True)
    assert torch.equal(run(op, name, False), PLANTED[name].expected)


def test_memory_that_nobody_wrote_is_nan(op):
    assert torch.equal(run(op, "read_dynamic", True).isnan(), torch.arange(N) == N - 1)
    assert torch.equal(run(op, "unwritten", True).isnan(), torch.arange(4 * N) >= N)


def test_copies_arrive_at_their_wait(op):
    assert run(op, "missing_wait", True).isnan().all()
    second = torch.arange(4 * N + 130) >= 4 * N
    assert torch.equal(run(op, "stages", True).isnan(), second)


@pytest.mark.parametrize(
    "blocks, threads, shared_bytes",
    [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, (227 << 10) + 1)],
)
def test_impossible_launches_are_refused(op, blocks, threads, shared_bytes):
    with pytest.raises(RuntimeError, match="invalid block|invalid grid|at most 232448 bytes"):
        op.launch(numbers(8), blocks, threads, shared_bytes)


def test_the_largest_launch_runs(op):
    assert torch.equal(op.launch(numbers(8), 3, 1024, 227 << 10), torch.ones(8))


@pytest.mark.parametrize(
    "statement, message",
    [
        ("atomicAdd(static_cast<float*>(p.x), 1.0f)", "use of deleted function .float atomicAdd"),
        ("__shared__ float tile[4]", "use_L0K_SHARED_instead"),
    ],
)
def test_what_kernels_may_not_use_does_not_compile(folder, tmp_path, statement, message):
    source = tmp_path / "kernel.cu"
    source.write_text(
        '#include "cuda/common.cuh"\n'
        "struct Params { float* x; };\n"
        f"__global__ void kernel(const Params p) {{ {statement}; }}\n"
    )
    with pytest.raises(BuildError, match=message):
        build([source], tmp_path / "kernel.so")


# ---- planted bugs, with sanitizers ----


@pytest.fixture(scope="module")
def replay_planted(folder, tmp_path_factory):
    """Runs planted kernels, [(name, bug), ...], with a sanitizer."""

    def run_all(sanitize, calls):
        path = build([SOURCE], folder / sanitize / "planted.so", sanitize)
        arguments = [(name, (PLANTED[name].x, bug)) for name, bug in calls]
        return replay(SCHEMAS, arguments, [path], sanitize, tmp_path_factory.mktemp("calls"))

    return run_all


def lines_with(text):
    lines = SOURCE.read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if text in line]


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_are_silent_on_correct_kernels(replay_planted, sanitize):
    done = replay_planted(sanitize, [(name, False) for name in PLANTED])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(PLANTED)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "name, report",
    [
        ("write_dynamic", r"use-after-poison[^\n]*\nWRITE of size 4"),
        ("read_dynamic", r"use-after-poison[^\n]*\nREAD of size 4"),
        ("write_static", r"use-after-poison[^\n]*\nWRITE of size 4"),
        ("read_static", r"index 32 out of bounds for type 'float \[32\]'"),
        ("write_global", r"heap-buffer-overflow[^\n]*\nWRITE of size 4"),
        ("read_global", r"heap-buffer-overflow[^\n]*\nREAD of size 4"),
    ],
)
def test_address_sanitizer_finds_overruns(replay_planted, name, report):
    done = replay_planted("address", [(name, True)])
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr
    assert "planted.cu:" in done.stderr


@pytest.mark.parametrize(
    "name, one, other",
    [
        ("reverse", "tile[threadIdx.x] = p.x[threadIdx.x];", "tile[kThreads - 1 - threadIdx.x]"),
        ("reverse_warp", "tile[threadIdx.x] = p.x[threadIdx.x];", "tile[31 - threadIdx.x]"),
        ("rounds", "tile[threadIdx.x] = p.x[threadIdx.x] + round;", "(threadIdx.x + 7)"),
        ("last_block", "p.y[blockIdx.x] = p.x[blockIdx.x];", "sum += p.y[b]"),
        ("same_place", "p.y[kBug ? 0", "p.y[kBug ? 0"),
        ("reused_stage", "copy_async_16(&tile[mine]", "sum += tile[(mine + 4)"),
    ],
)
def test_thread_sanitizer_finds_races(replay_planted, name, one, other):
    done = replay_planted("thread", [(name, True)])
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr
    found = {int(line) for line in re.findall(rf"{name}<true>[^\n]*planted.cu:(\d+)", done.stderr)}
    first = min(lines_with(f"void {name}("))
    wanted = [min(n for n in lines_with(text) if n > first) for text in (one, other)]
    assert set(wanted) <= found
