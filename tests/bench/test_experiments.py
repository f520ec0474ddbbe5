# SPDX-License-Identifier: Apache-2.0
"""The experiments run, and say what they measured."""

from l0kernels.bench import experiments


def test_every_experiment_runs():
    found = experiments.measure("cpu", quick=True)
    assert found.keys() == experiments.EXPERIMENTS.keys()
    assert all(found.values())
    for row in (row for rows in found.values() for row in rows):
        # A CPU's profile has no kernels of a GPU.
        times = {key: value for key, value in row.items() if key.endswith(" ms")}
        assert all(value > 0 for key, value in times.items() if key != "GPU busy ms")
    text = experiments.markdown(found)
    assert all(f"### {name}" in text for name in found)
    assert [row["open"] for row in found["grouped"]] == [1.0, 0.5, 0.25, 0.1]
