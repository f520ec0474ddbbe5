# SPDX-License-Identifier: Apache-2.0
"""Random networks: what ``convert`` accepts equals the masked oracle, whatever it refuses."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisException
from torch import nn

import l0kernels as l0
from fuzz.cases import Case, Outcome, Tally, Wrong, cases, run_case
from fuzz.search import Found, search

CASES = {"2d": 500, "1d": 250, "tokens": 250}
