# SPDX-License-Identifier: Apache-2.0
"""The numbers of the table, from a history made by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from l0kernels.recipes import summary
from l0kernels.recipes.loop import Plan


def _entry(loss: float, seconds: float, accuracy: float, memory: int | None) -> dict[str, Any]:
    return {
        "loss": loss,
        "data_loss": loss / 2,
        "seconds": seconds,
        "step_ms": 1e3 * seconds / 10,
        "accuracy": accuracy,
        "open_units": [9, 18, 65, 25],
        "weights_total": 1000,
        "weights_expected": 250.0,
        "weights_realised": 240.0,
        "weights_test": 200,
        "step_memory": memory,
    }


@pytest.fixture
def result(make_plan: Callable[..., Plan]) -> summary.Result:
    """Three epochs of two arms."""
    packed = [
        _entry(4.0, 1.0, 50, 3 << 20),
        _entry(2.0, 0.5, 60, None),
        _entry(1.0, 1.0, 98.5, 1 << 20),
    ]
    masked = [
        _entry(4.0, 1.0, 50, 4 << 20),
        _entry(2.1, 2.0, 60, None),
        _entry(1.0, 2.0, 98.0, 4 << 20),
    ]
    history = [
        {
            "epoch": number,
            "phase": "training",
            "first": "packed",
            "arms": {"packed": p, "masked": m},
        }
        for number, (p, m) in enumerate(zip(packed, masked, strict=True), 1)
    ]
    return summary.Result(make_plan(), history, "channels_last")


def test_comparison(result: summary.Result) -> None:
    assert summary.comparison(result) == pytest.approx(
        {
            "speed_up_first": 1.0,
            "speed_up_last": 2.0,
            "speed_up_best": 4.0,
            "speed_up": 2.0,
            "loss_difference": 0.1 / 2.1,
            "data_loss_difference": 0.1 / 2.1,
            "data_loss_difference_absolute": 0.05,
            "accuracy_difference": 0.5,
        }
    )


def test_table(result: summary.Result) -> None:
    lines = summary.markdown([result]).splitlines()
    assert (
        "| 0 | packed | 98.50 | 9-18-65-25 | 25.0 / 24.0 / 20.0 | 100.00 / 100.00 | 3.0 / 1.0 |"
        in lines
    )
    assert "| 0 | 1.00 | 2.00 | 4.00 | 2.00 | 4.76 / 4.76 / 0.0500 | 0.50 |" in lines
    assert any(line.startswith("| 0 | masked (channels_last) | 98.00 |") for line in lines)
