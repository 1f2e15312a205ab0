"""The JSON schema of a jobs file: the committed one is that of the models, and it takes what they take."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from jsonschema import Draft202012Validator

from lorafusion.core.config import CONFIGS
from lorafusion.train.schema import jobs_schema

SCHEMA = Draft202012Validator(json.loads(jobs_schema()))
JOBS = """
model: tiny
output: out
wandb: "off"
checkpointing: 0.5
defaults: {rank: 8, data: {jsonl: rows.jsonl, completion: "{answer}"}}
jobs:
  - name: a
    evaluation: 0.1
  - name: b
    data: {synthetic: {}}
    steps: 3
"""


def test_the_committed_schema_is_that_of_the_models():
    """`lorafusion train --schema > configs/jobs.schema.json` writes it."""
    assert (CONFIGS / "jobs.schema.json").read_text() == jobs_schema()


def test_it_is_a_schema_that_takes_a_jobs_file():
    Draft202012Validator.check_schema(json.loads(jobs_schema()))
    assert list(SCHEMA.iter_errors(yaml.safe_load(JOBS))) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model:", "modell:"),
        ("name: a", "nam: a"),
        ("rank: 8", "rank: 0"),
        ("rank: 8", "name: c"),
        ("steps: 3", "steps: three"),
        ("completion", "completed"),
        ("jobs:", "path: here\njobs:"),
    ],
)
def test_it_finds_a_mistake(before, after):
    data = yaml.safe_load(re.sub(before, after, JOBS, count=1))
    assert list(SCHEMA.iter_errors(data))
