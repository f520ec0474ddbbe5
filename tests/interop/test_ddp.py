# SPDX-License-Identifier: Apache-2.0
"""Two processes under DistributedDataParallel against one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interop.ddp_worker import CASES, WORLD, Record, prepare, train
from interop.nets import assert_equal

LIMIT = 300  # seconds; a rank that waits for the other for ever is the failure to look for


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Record]]]:
    """What each rank recorded, by case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ddp")
    worker = (sys.executable, "-m", "interop.ddp_worker")
    outs = [folder / f"{rank}.pt" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [*worker, str(rank), str(folder / "store"), str(out)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    logs = []
    try:
        for process in processes:
            logs.append(process.communicate(timeout=LIMIT)[0])
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        logs = [process.communicate()[0] for process in processes]
        pytest.fail("a rank hangs:\n" + "\n---\n".join(logs))
    failed = [log for process, log in zip(processes, logs, strict=True) if process.returncode]
    assert not failed, "\n---\n".join(failed)
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_in_every_step(name: str, ranks: list[dict[str, list[Record]]]):
    first, second = (rank[name] for rank in ranks)
    assert len(first) == CASES[name].steps + 1
    for a, b in zip(first[:-1], second[:-1], strict=True):
        assert a["z"].equal(b["z"]) and a["step"] == b["step"]
        assert_equal(a["gradients"], b["gradients"])
    assert_equal(first[-1]["parameters"], second[-1]["parameters"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.norms_train])
def test_two_ranks_equal_the_big_batch(name: str, ranks: list[dict[str, list[Record]]]):
    case = CASES[name]
    net = prepare(case, seed=0)
    whole = train(case, net, net, 0, 1)
    for step, (expected, got) in enumerate(zip(whole[:-1], ranks[1][name][:-1], strict=True)):
        torch.testing.assert_close(got["z"], expected["z"], atol=1e-9, rtol=0)
        assert_equal(expected["gradients"], got["gradients"], tolerance=1e-9)
        assert expected["step"] == got["step"]
        gates = got["gradients"]["l0.log_alpha"]
        assert bool(gates.any()) == (step not in case.frozen)
    assert_equal(whole[-1]["parameters"], ranks[1][name][-1]["parameters"], tolerance=1e-9)


def test_gates_change_from_step_to_step_unless_frozen(ranks: list[dict[str, list[Record]]]):
    for name, steps in (("20 steps", 20), ("frozen from the start", 1)):
        records = ranks[0][name][:-1]
        assert len({tuple(record["z"].tolist()) for record in records}) == steps


def test_statistics_of_each_rank_count_open_features_of_the_common_draw(
    ranks: list[dict[str, list[Record]]],
):
    # DDP sends rank 0's buffers before each forward: only the last update may differ.
    first, second = (rank["norms in training mode"][-1]["statistics"] for rank in ranks)
    closed = ranks[0]["norms in training mode"][-2]["z"][:12] == 0
    for name in ("norm.running_mean", "norm.running_var"):
        assert first[name][closed].equal(second[name][closed])
        assert not first[name][~closed].equal(second[name][~closed])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.budget])
def test_ranks_agree_on_the_multiplier(name: str, ranks: list[dict[str, list[Record]]]):
    first, second = (rank[name][-1]["statistics"] for rank in ranks)
    case = CASES[name]
    net = prepare(case, seed=0)
    whole = train(case, net, net, 0, 1)[-1]["statistics"]
    assert float(first["budget.multiplier"]) > 0 and int(first["budget.step"]) == case.steps
    for key in ("budget.multiplier", "budget.step"):
        assert first[key].equal(second[key])
        if not case.norms_train:
            torch.testing.assert_close(first[key], whole[key], atol=1e-9, rtol=0)
