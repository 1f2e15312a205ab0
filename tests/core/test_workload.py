"""Jobs, streams, global batches, and what a workload file may say."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Sample, Workload


def test_scaling_is_alpha_over_rank_or_its_root(make_job):
    assert make_job(rank=16, alpha=32.0).scaling == 2.0
    assert make_job(rank=16, alpha=32.0, rslora=True).scaling == 8.0


@given(
    samples=st.integers(1, 20),
    batch=st.integers(1, 25),
    epochs=st.integers(1, 3),
)
def test_batches_cover_the_stream_in_order_and_never_cross_an_epoch(samples, batch, epochs):
    job = Job(
        name="a",
        dataset="toy",
        rank=1,
        alpha=1,
        global_batch_size=batch,
        epochs=epochs,
        samples=[Sample(i, i + 2) for i in range(samples)],
    )
    assert [position for positions in job.batches for position in positions] == list(range(job.stream_length))
    assert len(job.batches) == epochs * math.ceil(samples / batch)
    for index, positions in enumerate(job.batches):
        assert {job.batch_of(position) for position in positions} == {index}
        assert len({position // samples for position in positions}) == 1
    offsets = [job.stream_offset(position) for position in range(job.stream_length)]
    lengths = [job.sample_at(position).tokens for position in range(job.stream_length)]
    assert offsets == [sum(lengths[:position]) for position in range(job.stream_length)]


def test_json_round_trip_keeps_the_hash_and_any_change_changes_it(make_job, make_workload, tmp_path):
    workload = make_workload()
    path = tmp_path / "workload.json"
    path.write_text(workload.to_json())
    again = Workload.read(path)
    assert again == workload
    assert again.content_hash == workload.content_hash
    changed = make_workload(make_job("a", dropout=0.25), workload.jobs[1])
    assert changed.content_hash != workload.content_hash


def test_the_keys_of_a_job_keep_their_order(make_workload):
    """Workload files stay byte for byte, whichever class has a field."""
    job = json.loads(make_workload().to_json())["jobs"][0]
    assert list(job) == [
        *("name", "dataset", "rank", "alpha", "dropout", "rslora", "target_modules", "learning_rate", "weight_decay"),
        *("seed", "global_batch_size", "epochs", "steps", "start", "schedule", "warmup_steps", "max_grad_norm"),
        *("samples", "evaluation", "evaluate_every"),
    ]


def test_a_usual_priority_and_weight_are_no_part_of_a_file_or_its_hash(make_job, make_workload, tmp_path):
    """Results of workloads from before there were these keys stay theirs."""
    usual = make_workload(make_job("a"))
    assert usual.content_hash == "cc0f3de2be2d28ed"
    stated = make_workload(make_job("a", priority=0, weight=1.0))
    assert (stated.to_json(), stated.content_hash) == (usual.to_json(), usual.content_hash)
    path = tmp_path / "workload.json"
    for change in ({"priority": -2}, {"weight": 0.5}, {"priority": 3, "weight": 7.0}):
        changed = make_workload(make_job("a", **change))
        assert changed.content_hash != usual.content_hash
        path.write_text(changed.to_json())
        assert Workload.read(path) == changed
        assert json.loads(path.read_text())["jobs"][0].items() >= change.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "jobs.0.weight: input should be greater than 0 (found 0)"),
        ({"weight": -1.5}, "jobs.0.weight: input should be greater than 0 (found -1.5)"),
        ({"weight": math.nan}, "NaN"),
        ({"weight": "2"}, "jobs.0.weight: input should be a valid number (found '2')"),
        ({"priority": 0.5}, "jobs.0.priority: input should be a valid integer"),
        ({"priority": 1001}, "jobs.0.priority: input should be less than or equal to 1000 (found 1001)"),
        ({"priority": 1, "start": 3}, "start: 3 of 3 global batches are trained, nothing remains"),
        ({"rank": 0}, "jobs.0.rank: input should be greater than or equal to 1 (found 0)"),
        ({"dropout": 1.0}, "jobs.0.dropout: input should be less than 1 (found 1.0)"),
        ({"samples": []}, "jobs.0.samples"),
        ({"samples": [[0, 1]]}, "jobs.0.samples.0"),
        ({"name": "a.b"}, "jobs.0.name"),
        ({"ranks": 4}, "jobs.0.ranks: unknown key (found 4)"),
    ],
)
def test_a_bad_job_is_named_with_file_and_key(make_workload, tmp_path, change, message):
    data = json.loads(make_workload().to_json())
    data["jobs"][0] |= change
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        Workload.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_two_jobs_of_one_name_are_refused(make_job):
    with pytest.raises(ValueError, match="two jobs are named 'a'"):
        Workload(name="twins", jobs=(make_job("a"), make_job("a")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a workload file, as it is not JSON"),
        ("[1]", "expected a JSON object with a workload, found a list"),
        ('{"version": 2}', "workload of version 2, expected version 1"),
        ("{}", "workload of version None, expected version 1"),
    ],
)
def test_a_file_that_is_no_workload_says_so(tmp_path, content, message):
    path = tmp_path / "workload.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        Workload.read(path)
    assert message in str(caught.value)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: no such workload file"):
        Workload.read(tmp_path / "gone.json")
