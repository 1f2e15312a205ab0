"""The jobs file: defaults under jobs, paths from its folder, and every mistake one line with file, job and key."""

from __future__ import annotations

import math

import pytest
import yaml

from lorafusion.core.config import CONFIGS
from lorafusion.core.schema import UserError
from lorafusion.core.workload import ALL_LINEAR, ORDER_KEYS, Hyperparameters, Job
from lorafusion.data.blocks import HubData, JsonlData, SyntheticData, TextData
from lorafusion.train.config import TrainConfig, TrainJob, read_train_config
from lorafusion.train.run import train

SYNTHETIC = {"synthetic": {"samples": 4}}


@pytest.fixture
def read(tmp_path):
    """Reads a jobs file with a job `a` on synthetic data, with changes at the top and in the job."""

    def read(top=None, **job):
        data = {"model": "tiny", "output": "out", "jobs": [{"name": "a", "data": SYNTHETIC} | job]} | (top or {})
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(data))
        return read_train_config(path)

    return read


def test_a_short_file_has_sensible_defaults(read, tmp_path):
    config = read()
    assert config.path == tmp_path / "sweep.yaml"
    assert config.output == tmp_path / "out"
    assert (config.model, config.stages, config.checkpointing, config.wandb) == ("tiny", 1, "auto", "off")
    assert (config.graphs, config.attention) == ("auto", "flash")
    (job,) = config.jobs
    assert job.data == SyntheticData(synthetic={"samples": 4})
    assert job.hyper_parameters == {
        "name": "a",
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "rslora": False,
        "target_modules": ALL_LINEAR,
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "seed": 0,
        "global_batch_size": 8,
        "steps": None,
        "schedule": "linear",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "evaluate_every": None,
        "priority": 0,
        "weight": 1.0,
    }


@pytest.mark.parametrize("name", [*Hyperparameters.model_fields, *ORDER_KEYS])
def test_a_hyper_parameter_may_be_what_a_job_allows(name):
    """A jobs file has other defaults than a workload, and nothing else."""
    models = (Hyperparameters, Job, TrainJob)
    base, *others = (model.model_fields[name] for model in models if name in model.model_fields)
    for field in others:
        assert (field.annotation, field.description) == (base.annotation, base.description)
        assert repr(field.metadata) == repr(base.metadata)


def test_a_config_survives_json(read):
    config = read({"checkpointing": 0.25}, evaluation=SYNTHETIC, evaluate_every=3)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_a_jobs_own_keys_win_over_the_defaults(read):
    jobs = [{"name": "a"}, {"name": "b", "rank": 4, "data": {"synthetic": {"samples": 9}}}]
    config = read({"defaults": {"rank": 8, "alpha": 2, "data": SYNTHETIC}, "jobs": jobs})
    assert [(job.rank, job.alpha, job.data.synthetic.samples) for job in config.jobs] == [(8, 2, 4), (4, 2, 9)]


def test_defaults_are_checked_after_they_are_merged(read):
    assert read({"defaults": {"rank": 0}}, rank=4).jobs[0].rank == 4
    assert read({"defaults": None}).jobs[0].rank == 16
    with pytest.raises(UserError, match=r"sweep\.yaml: jobs\.a: rank: input should be greater than or equal to 1"):
        read({"defaults": {"rank": 0}})


def test_yamls_own_words_are_understood(tmp_path):
    """YAML 1.1 reads `off` as false and 1e-4 as a string."""
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "model: tiny\noutput: out\nwandb: off\ngraphs: on\ncheckpointing: none\n"
        "jobs: [{name: a, learning_rate: 1e-4, data: {synthetic: {}}}]\n"
    )
    config = read_train_config(path)
    assert (config.wandb, config.graphs, config.checkpointing) == ("off", "on", "none")
    assert config.jobs[0].learning_rate == 1e-4


@pytest.mark.parametrize(("written", "graphs"), [("off", "off"), ("no", "off"), ("yes", "on"), ("auto", "auto")])
def test_graphs_are_switched_by_a_word(tmp_path, written, graphs):
    path = tmp_path / "jobs.yaml"
    path.write_text(f"model: tiny\noutput: out\ngraphs: {written}\njobs: [{{name: a, data: {{synthetic: {{}}}}}}]\n")
    assert read_train_config(path).graphs == graphs


@pytest.mark.parametrize(
    ("written", "share"), [("1e-1", 0.1), ("5e-1", 0.5), ("2.5e-01", 0.25), ("0", 0.0), (".5", 0.5)]
)
def test_a_share_is_a_number_however_it_is_written(tmp_path, written, share):
    path = tmp_path / "jobs.yaml"
    path.write_text(
        f"model: tiny\noutput: out\ncheckpointing: {written}\n"
        f"jobs: [{{name: a, evaluation: {written}, data: {{synthetic: {{}}}}}}]\n"
    )
    config = read_train_config(path)
    assert (config.checkpointing, config.jobs[0].evaluation) == (share, share)
    path.write_text(path.read_text().replace(f"evaluation: {written}", "evaluation: 6e-1"))
    with pytest.raises(UserError, match=r"evaluation: expected a share from 0 to 0\.5, or a data block \(found 0\.6\)"):
        read_train_config(path)


def test_paths_are_relative_to_the_files_folder(read, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "base").mkdir()
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text('{"x": "y"}')
    config = read(
        {"model": "./base", "tokenizer": "base", "output": "../out"},
        data={"jsonl": "a.jsonl", "completion": "{x}"},
        evaluation={"text": [str(tmp_path / "b.txt")]},
    )
    assert (config.model, config.tokenizer) == (str(tmp_path / "base"), str(tmp_path / "base"))
    assert config.output == tmp_path.parent / "out"
    assert config.jobs[0].data == JsonlData(jsonl=tmp_path / "a.jsonl", completion="{x}")
    assert config.jobs[0].evaluation_data == TextData(text=tmp_path / "b.txt")


@pytest.mark.parametrize("model", ["tiny", "owner/name", str(CONFIGS / "models" / "tiny.yaml")])
def test_a_model_has_a_name_or_a_place(read, model):
    config = read({"model": model, "tokenizer": "owner/other"})
    assert (config.model, config.tokenizer) == (model, "owner/other")
    assert config.is_described == (model != "owner/name")


def test_a_dataset_of_the_hub(read):
    data = {"hub": "owner/name", "subset": "main", "prompt": "{q}", "completion": "{a}"}
    assert read(data=data).jobs[0].data == HubData(**data)
    assert read(data=data).jobs[0].data.dataset == "hub:owner/name/main/train"


def test_the_device_and_its_dtype_are_those_of_the_machine(read, monkeypatch):
    for gpu, expected in ((True, ("cuda", "bfloat16")), (False, ("cpu", "float32"))):
        monkeypatch.setattr("lorafusion.train.config.has_gpu", lambda gpu=gpu: gpu)
        assert (read().chosen_device, read().chosen_dtype) == expected
        asked = read({"device": "cpu", "dtype": "float64"})
        assert (asked.chosen_device, asked.chosen_dtype) == ("cpu", "float64")


TOP = {
    "a misspelt key": ({"modle": "tiny"}, "modle: unknown key (found 'tiny')"),
    "no output": ({"output": None}, "output: input is not a valid path"),
    "an unknown model": (
        {"model": "gpt"},
        "model: expected a folder or a repository owner/name; or one of configs/mod",
    ),
    "a folder that is not there": ({"model": "./base"}, "tiny (found './base')"),
    "a description that is not there": ({"model": "x.yaml"}, "model: no such file"),
    "no such tokenizer": (
        {"tokenizer": "/none"},
        "tokenizer: expected a folder or a repository owner/name (found '/none')",
    ),
    "other weights": ({"weights": "hub"}, "weights: input should be 'random' (found 'hub')"),
    "replicas that do not divide": (
        {"processes": 4, "data_parallel": 3},
        "data_parallel: 4 processes cannot hold replicas of equal size (found 3)",
    ),
    "a share of more than all": (
        {"checkpointing": 1.5},
        "checkpointing: expected auto, none, all or a share from 0 to 1",
    ),
    "an unknown word": ({"checkpointing": "some"}, "a share from 0 to 1 (found 'some')"),
    "a word that YAML turns into true": ({"checkpointing": True}, "a share from 0 to 1 (found 'true')"),
    "wandb on": ({"wandb": True}, "wandb: input should be 'off', 'offline' or 'online' (found True)"),
    "no capacity": ({"capacity": 0}, "capacity: input should be greater than or equal to 2 (found 0)"),
    "a dtype": ({"dtype": "int8"}, "dtype: input should be 'float64', 'float32', 'bfloat16' or 'float16'"),
    "no jobs": ({"jobs": []}, "jobs: expected a list of jobs, found a list"),
    "jobs by name": ({"jobs": {"a": {}}}, "jobs: expected a list of jobs, found a mapping"),
    "no mapping": ({"jobs": ["a"]}, "jobs.0: expected a mapping, found 'a'"),
    "no name": ({"jobs": [{"data": SYNTHETIC}]}, "jobs.0: name: field required"),
    "two of a name": (
        {"jobs": [{"name": "a", "data": SYNTHETIC}] * 2},
        "jobs: two are named 'a'; adapters need distinct",
    ),
    "defaults of no key": ({"defaults": {"color": 1}}, "defaults: color: unknown key (found 1); known: "),
    "a name for all": ({"defaults": {"name": "a"}}, "defaults: name: unknown key (found 'a'); known: "),
    "defaults that are no mapping": ({"defaults": [1]}, "defaults: expected a mapping, found a list"),
    "defaults that are a number": ({"defaults": 0}, "defaults: expected a mapping, found 0"),
    "its own path": ({"path": "x"}, "path: unknown key"),
}


@pytest.mark.parametrize("name", list(TOP))
def test_a_mistake_at_the_top_is_one_line(read, tmp_path, name):
    change, message = TOP[name]
    assert_says(lambda: read(change), f"{tmp_path / 'sweep.yaml'}: ", message)


@pytest.mark.parametrize("key", ["model", "tokenizer", "output", "jsonl", "text"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b", "null"),
        ("~nobody-of-this-name/x", "home directory"),
        ("x" * 300, "too long"),
        ("x/" * 3000, "too long"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(read, tmp_path, key, name, reason):
    if key in ("model", "tokenizer", "output"):
        assert_says(lambda: read({key: name}), f"{tmp_path / 'sweep.yaml'}: {key}: not a path (", reason)
    else:
        data = {key: name} | ({"completion": "{a}"} if key == "jsonl" else {})
        assert_says(lambda: read(data=data), f"{tmp_path / 'sweep.yaml'}: jobs.a.data.{key}: not a path (", reason)


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-this-name/x", "x" * 300])
def test_an_output_that_cannot_be_is_told_by_the_command_too(tmp_path, name):
    path = tmp_path / "jobs.yaml"
    path.write_text(yaml.safe_dump({"output": name, "model": "tiny", "jobs": [{"name": "a", "data": SYNTHETIC}]}))
    with pytest.raises(UserError, match=r"jobs\.yaml: output: not a path"):
        train(path)


ROWS = {"hub": "x/y", "completion": "{a}"}
JOB = {
    "a misspelt key": ({"learning_rat": 1}, "learning_rat: unknown key (found 1)"),
    "no rank": ({"rank": 0}, "rank: input should be greater than or equal to 1 (found 0)"),
    "a weight of zero": ({"weight": 0}, "weight: input should be greater than 0 (found 0)"),
    "a weight below zero": ({"weight": -2}, "weight: input should be greater than 0 (found -2)"),
    "a weight that is no number": ({"weight": math.nan}, "weight: input should be a finite number (found nan)"),
    "a priority between two": ({"priority": 1.5}, "priority: input should be a valid integer"),
    "two mistakes": ({"rank": 0, "alpha": 0}, "jobs.a: alpha: input should be greater than 0 (found 0)"),
    "an unknown linear": ({"target_modules": ["q"]}, "target_modules: unknown linear 'q'; known: q_proj, k_proj"),
    "a schedule": ({"schedule": "step"}, "schedule: input should be 'constant', 'linear' or 'cosine' (found 'step')"),
    "what to do with long ones": ({"too_long": "cut"}, "too_long: input should be 'truncate', 'drop' or 'error'"),
    "half and more": ({"evaluation": 0.6}, "evaluation: expected a share from 0 to 0.5, or a data block (found 0.6)"),
    "a word": ({"evaluation": "some"}, "evaluation: expected a share from 0 to 0.5, or a data block (found 'some')"),
    "evaluation of text": (
        {"evaluation": ROWS},
        "evaluation: expected synthetic data where the job's data is synthetic",
    ),
    "evaluation on synthetic data": ({"data": ROWS, "evaluation": SYNTHETIC}, "evaluation: expected synthetic data"),
    "evaluation on nothing": ({"evaluate_every": 5}, "evaluate_every: `evaluation` does not say on what (found 5)"),
    "no data": ({"data": None}, "expected a mapping with one of the keys jsonl, hub, text, synthetic, found None"),
    "a block of no kind": ({"data": {"csv": "x"}}, "with one of the keys jsonl, hub, text, synthetic, found csv"),
    "a key in a block": ({"data": ROWS | {"split_": "x"}}, "split_: unknown key"),
    "lengths of nothing": (
        {"data": {"synthetic": {"dataset": "c4"}}},
        "synthetic.dataset: unknown dataset; known: cnn_dailymail, mixed, wikisum, xsum (found 'c4')",
    ),
    "a text that is not there": ({"data": {"text": "none.txt"}}, ".text: no such file"),
    "a bad block to evaluate on": ({"evaluation": {"text": "none.txt"}}, ".evaluation.text: no such file"),
}


@pytest.mark.parametrize("name", list(JOB))
def test_a_mistake_in_a_job_names_the_job(read, tmp_path, name):
    change, message = JOB[name]
    assert_says(lambda: read(**change), f"{tmp_path / 'sweep.yaml'}: jobs.a", message)


def assert_says(action, beginning, message):
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert text.startswith(beginning)
    assert message in text
    assert all(line.startswith(beginning) for line in text.splitlines())


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such YAML file"):
        read_train_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"x\.yaml: cannot be read as a YAML file \(File name too long\)"):
        read_train_config(tmp_path / f"{300 * 'x'}.yaml")
