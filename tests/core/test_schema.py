"""No setting is a number that is none, a word for a number, or more than a machine can hold."""

from __future__ import annotations

import json
import math
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import Field, ValidationError

from lorafusion.core.config import CONFIGS, ModelConfig
from lorafusion.core.plan import Plan
from lorafusion.core.schema import Config, Mistakes, UserError, validated
from lorafusion.core.workload import Job, Workload
from lorafusion.data.blocks import SyntheticSamples, TextData
from lorafusion.data.lengths import AdapterConfig, LengthDistribution
from lorafusion.lab.experiments.kernel_suite import (
    KernelSuite,
    LayerBlock,
    LinearBlock,
    TokenRange,
    Traffic,
    Verification,
)
from lorafusion.lab.experiments.planner import PlannerGrid, PlannerSuite
from lorafusion.lab.experiments.steps_suite import StepsBench, StepsSuite
from lorafusion.lab.suite import Grid, Suite, read_suite
from lorafusion.lab.tuned import Tried
from lorafusion.train.config import TrainConfig, TrainJob, read_train_config

MODELS = (AdapterConfig, StepsBench, Grid, Job, KernelSuite, LayerBlock, LengthDistribution, LinearBlock, ModelConfig,
          Plan, PlannerGrid, PlannerSuite, StepsSuite, Suite, SyntheticSamples, TextData, TokenRange, TrainConfig,
          TrainJob, Traffic, Tried, Verification)  # fmt: skip


def numbers(annotation: object) -> set[type]:
    """The kinds of number that a field, or what is in it, may be."""
    if annotation in (int, float):
        return {annotation}
    if get_origin(annotation) is Literal:
        return set()
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return numbers(arguments[0])
    return set().union(*(numbers(one) for one in arguments if one is not Ellipsis))


FIELDS = [
    (model, name)
    for model in MODELS
    for name, field in model.model_fields.items()
    # The library's own, and one whose rule is told for all its values at once.
    if numbers(field.annotation) and (model, name) not in {(ModelConfig, "rope_parameters"), (Grid, "capacity")}
]


def mistakes(model: type, name: str, value: object) -> list[str]:
    """What is wrong about one field of a model, the others being left out."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return [one["msg"] for one in error.errors() if one["loc"][:1] == (name,) and one["type"] != "missing"]
    return []


def in_place(annotation: object, value: object) -> list[object]:
    """A value in all places of a field where a number may be."""
    if get_origin(annotation) is Annotated:
        return in_place(get_args(annotation)[0], value)
    if get_origin(annotation) in (Union, UnionType):
        return [one for kind in get_args(annotation) for one in in_place(kind, value)]
    if annotation in (int, float):
        return [value]
    if get_origin(annotation) in (list, tuple) and numbers(annotation):
        return [[one] * (2 if len(get_args(annotation)) == 2 and Ellipsis not in get_args(annotation) else 1)
                for one in in_place(get_args(annotation)[0], value)]  # fmt: skip
    if get_origin(annotation) is dict and numbers(annotation):
        return [{"xsum": one} for one in in_place(get_args(annotation)[1], value)]
    return []


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, 10**12 + 1, True, -1, "nan", "1e300"])
def test_no_number_is_infinite_none_or_beyond_all_use(value):
    """In any setting that is a number, and in any number of a plan, a workload or a tuning."""
    for model, name in FIELDS:
        if value == -1 and name == "priority":  # below that of usual jobs
            continue
        for placed in in_place(model.model_fields[name].annotation, value):
            assert mistakes(model, name, placed), f"{model.__name__}.{name}: {placed!r} passes"


@pytest.mark.parametrize("value", [0, 10**12, math.inf, math.nan, True, "many"])
def test_a_capacity_is_a_number_of_tokens(value, tmp_path):
    data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
    data["cells"][0]["capacity"] = value
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=r"s.yaml: cells.0[.:].*capacity"):
        read_suite(tmp_path / "s.yaml")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_parameters_of_a_rotation_are_finite(value):
    assert mistakes(ModelConfig, "rope_parameters", {"rope_theta": value})


@pytest.mark.parametrize("field", [one for one in FIELDS if issubclass(one[0], Config)], ids=lambda one: one[1])
def test_a_number_with_an_exponent_is_one_in_every_setting(field):
    """YAML 1.1 takes 1e0 for a word."""
    model, name = field
    for placed in in_place(model.model_fields[name].annotation, "1e0"):
        number = json.loads(json.dumps(placed).replace('"1e0"', "1"))
        assert mistakes(model, name, placed) == mistakes(model, name, number)


class Words(Config):
    word: str = ""
    either: int | str = ""
    count: int = Field(default=1, ge=1)


def test_a_word_stays_a_word():
    made = Words.model_validate({"word": "1e5", "either": "2e2", "count": "3e2"})
    assert (made.word, made.either, made.count) == ("1e5", "2e2", 300)


class Inner(Config):
    size: int = 1
    pair: tuple[int, int] | dict[str, int] = (1, 1)


class Outer(Config):
    name: str
    parts: list[Inner] = Field(default=[], min_length=1)
    by_name: dict[str, Inner] = {}
    either: Inner | float = 0.0


MISTAKEN = {
    "a misspelt key, before the missing one": (
        {"nme": 1},
        ["nme: unknown key (found 1); did you mean name?", "name: field required"],
    ),
    "a key like no other": (
        {"name": "x", "zzz": [1]},
        ["zzz: unknown key (found a list); known: by_name, either, name, parts"],
    ),
    "keys of a list's items": (
        {"name": "x", "parts": [{"size": "y"}, {"sise": 2}, 3]},
        ["parts.1.sise: unknown key (found 2); did you mean size?",
         "parts.0.size: input should be a valid integer, unable to parse string as an integer (found 'y')",
         "parts.2: expected a mapping (found 3)"],
    ),
    "a key of a dictionary's item": (
        {"name": "x", "by_name": {"first": {"sizes": 2}}},
        ["by_name.first.sizes: unknown key (found 2); did you mean size?"],
    ),
    "neither of two kinds": (
        {"name": "x", "either": [1]},
        ["either: expected a mapping (found a list); or input should be a valid number (found a list)"],
    ),
    "a long value": (
        {"name": "x", "parts": "y" * 10**6},
        [f"parts: input should be a valid list (found '{'y' * 34} ... {'y' * 39}')"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MISTAKEN))
def test_all_mistakes_are_told_a_line_each(name):
    data, expected = MISTAKEN[name]
    with pytest.raises(UserError) as caught:
        validated(Outer, data, "x.yaml")
    assert str(caught.value).splitlines() == [f"x.yaml: {line}" for line in expected]


def test_twenty_mistakes_are_told_and_the_others_counted():
    with pytest.raises(UserError) as caught:
        validated(Outer, {"name": "x", "parts": list(range(1000))}, "x.yaml")
    *lines, last = str(caught.value).splitlines()
    assert (len(lines), last) == (20, "and 980 more mistakes")


def test_mistakes_of_several_parts_are_told_together():
    mistakes = Mistakes()
    for part in ("a", "b"):
        with mistakes.gathered():
            validated(Inner, {"size": part}, f"x.yaml: {part}")
    with mistakes.gathered():
        validated(Inner, {}, "x.yaml: c")
    with pytest.raises(UserError) as caught:
        mistakes.require_none()
    assert [line[:15] for line in str(caught.value).splitlines()] == ["x.yaml: a: size", "x.yaml: b: size"]


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [("evaluation", "1e-1", 0.1), ("learning_rate", "1e-4", 1e-4), ("learning_rate", "2.5E-4", 2.5e-4)],
)
def test_a_jobs_file_has_numbers_with_exponents(tmp_path, key, text, expected):
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "model: tiny\noutput: out\ncheckpointing: 5e-1\njobs:\n"
        f"  - name: a\n    data: {{synthetic: {{}}}}\n    {key}: {text}\n"
    )
    config = read_train_config(path)
    assert config.checkpointing == 0.5
    assert getattr(config.jobs[0], key) == expected


def test_a_suite_of_a_million_million_repeats_is_refused(tmp_path):
    data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data | {"repeats": 10**12}))
    with pytest.raises(UserError, match="s.yaml: repeats: input should be less than or equal to 1000"):
        read_suite(tmp_path / "s.yaml")


@pytest.mark.parametrize("sample", [[0, 1], [0, 0], [0, -5], [-1, 5], [0, True], [0, "7"], [0, 5.0], [0, 2**31], [0]])
def test_a_sample_of_a_workload_file_has_a_length(make_workload, sample, tmp_path):
    data = json.loads(make_workload().to_json())
    data["jobs"][0]["samples"][1] = sample
    (tmp_path / "w.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"w.json: jobs.0.samples.1"):
        Workload.read(tmp_path / "w.json")


@pytest.mark.parametrize(
    ("key", "value"), [("rank", True), ("alpha", "8"), ("alpha", True), ("global_batch_size", 2.0)]
)
def test_a_number_of_a_workload_file_is_a_number(make_workload, key, value):
    data = json.loads(make_workload().to_json())
    data["jobs"][0][key] = value
    with pytest.raises(UserError, match=f"jobs.0.{key}"):
        validated(Workload, data, "w.json")
