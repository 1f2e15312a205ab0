"""The check of a step's gradients: it holds for what is right and sees what losses hide."""

from __future__ import annotations

import math
from functools import partial

import pytest

from lorafusion.lab.checks import gradients, lossless
from lorafusion.lab.checks.toy_runs import SINGLE, Setup
from tests.training_faults import FAULTS, launched_here

SETUP = Setup(dtype="bfloat16", stretch=4)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs are in this process."""
    monkeypatch.setattr("lorafusion.lab.checks.toy_runs.launch", partial(launched_here, folder=tmp_path))


@pytest.fixture(scope="module")
def expected():
    return gradients.ExpectedGradients.of(SETUP, dropout=0.1)


def test_a_step_in_bfloat16_has_the_gradients_of_float64(here, expected):
    error, length = expected.errors(gradients.one_step("lorafusion", SINGLE, SETUP, expected).gradients)
    assert error <= gradients.MOST_ERROR
    assert length <= gradients.MOST_LENGTH_ERROR


@pytest.mark.parametrize("index", [0, 1, -1])
def test_a_gradient_that_is_no_number_is_seen_whichever_it_is(expected, index):
    wrong = {job: dict(tensors) for job, tensors in expected.rounded.items()}
    job = list(wrong)[index]
    name = list(wrong[job])[index]
    wrong[job][name] = wrong[job][name] * math.nan
    assert all(map(math.isnan, expected.errors(wrong)))


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_seen(here, expected, monkeypatch, name):
    FAULTS[name](monkeypatch)
    error, length = expected.errors(gradients.one_step("lorafusion", SINGLE, SETUP, expected).gradients)
    assert error > 1.2 * gradients.MOST_ERROR or length > 1.2 * gradients.MOST_LENGTH_ERROR


def test_adapters_trained_in_this_process_equal_plain_training(here):
    """Whatever plain training had in common with what it judges would be wrong on both sides and pass here."""
    verdict, _ = lossless.lossless([SINGLE])
    assert verdict.passed, verdict.figures
