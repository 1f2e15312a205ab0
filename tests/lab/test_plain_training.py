"""Runs held against plain training with transformers, PEFT and torch; and that plain training itself."""

from __future__ import annotations

import json

import pytest
import torch

from lorafusion.core.config import read_model
from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.lab.checks import toy_runs
from lorafusion.lab.checks.comparison import LOSS_TOLERANCE, WEIGHT_TOLERANCE
from lorafusion.lab.checks.toy_runs import EXACT, TrainingResult, toy_jobs, train
from lorafusion.lab.definitions import LabelledText, synthetic_text
from lorafusion.lab.plain_training import Base, build_model, optimizer_of, summed_loss, train_plainly
from lorafusion.lab.suite import Arrangement

pytestmark = pytest.mark.usefixtures("forked_runs")
TINY = read_model("tiny")
EVALUATION = tuple(Sample(100 + i, tokens) for i, tokens in enumerate((13, 2, 24)))


def jobs(**changes) -> tuple[Job, ...]:
    """Two jobs that differ in rank, scaling, dropout, targets and batch sizes; the second's last batches are short."""
    return tuple(job.model_copy(update=changes) for job in toy_jobs())


def assert_equal(workload: Workload, trained: TrainingResult, dtype: torch.dtype, loss: float, weight: float) -> None:
    for job in workload.jobs:
        plain = train_plainly(job, Base(TINY, dtype), dtype)
        assert trained.losses[job.name] == pytest.approx(plain.losses, rel=loss)
        assert trained.weights[job.name].keys() == plain.weights.keys()
        for name, tensor in plain.weights.items():
            assert tensor.norm() > 0, name
            assert (trained.weights[job.name][name] - tensor).norm() <= weight * tensor.norm(), name


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        (1, {}),
        (1, {"schedule": "linear", "warmup_steps": 2, "weight_decay": 0.1}),
        (2, {"schedule": "cosine", "max_grad_norm": 0.05, "steps": 5}),
        (1, {"prompt": 0.9, "steps": 3}),
    ],
    ids=["plain", "linear", "cosine", "prompts"],
)
def test_a_run_computes_what_plain_training_computes(stages, changes):
    workload = Workload(name="toy", jobs=jobs(**changes))
    trained = train(workload, "lorafusion", Arrangement(stages, 1, False))
    assert_equal(workload, trained, torch.float64, LOSS_TOLERANCE, WEIGHT_TOLERANCE)


def test_in_float32_the_losses_are_those_of_plain_training():
    """Of the weights' rounding lorafusion/lab/checks/comparison.py tells."""
    workload = Workload(name="toy", jobs=jobs())
    assert_equal(
        workload,
        train(workload, "lorafusion", setup=EXACT._replace(dtype="float32")),
        torch.float32,
        loss=1e-5,
        weight=1e-3,
    )


def test_evaluations_are_those_of_plain_training(tmp_path, monkeypatch):
    """At intervals and at the end, without dropout; training goes on as if there were none."""
    workload = Workload(name="toy", jobs=jobs(evaluation=EVALUATION, evaluate_every=4, prompt=0.6))
    launch = toy_runs.launch

    def with_events(spec, *arguments):
        return launch(spec.model_copy(update={"events": str(tmp_path)}), *arguments)

    monkeypatch.setattr(toy_runs, "launch", with_events)
    trained = train(workload, "lorafusion", Arrangement(2, 1, False))
    assert_equal(workload, trained, torch.float64, LOSS_TOLERANCE, WEIGHT_TOLERANCE)
    lines = (tmp_path / "replica-0.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if "evaluation" in event]
    for index, job in enumerate(workload.jobs):
        found = {event["step"]: event["evaluation"] for event in events if event["adapter"] == index}
        assert list(found) == [4, 6]
        assert found == pytest.approx(
            train_plainly(job, Base(TINY, torch.float64), torch.float64).evaluations, rel=LOSS_TOLERANCE
        )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_are_those_of_transformers(schedule, warmup):
    job = jobs(schedule=schedule, warmup_steps=warmup)[0]
    optimizer, scheduler = optimizer_of([torch.nn.Parameter(torch.zeros(1))], job, len(job.batches))
    for step in range(len(job.batches)):
        assert job.learning_rate_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("first_label", [1, 5])
def test_the_loss_is_transformers_own_of_the_tokens_that_are_learnt(first_label):
    job = jobs(dropout=0.0)[0]
    whole, _ = build_model(job, Base(TINY, torch.float32))
    ids = synthetic_text(job, Sample(0, 9), TINY.vocab_size).ids
    labels = ids.clone()
    labels[:first_label] = -100
    expected = whole(input_ids=ids[None], labels=labels[None]).loss
    assert summed_loss(whole, LabelledText(ids, first_label)).item() == pytest.approx(
        expected.item() * (9 - first_label)
    )
