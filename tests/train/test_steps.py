"""How long a job is trained: steps, epochs and warm-up, and what is said of them; and which base it is trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafusion.core.schema import UserError
from lorafusion.model.weights import checkpoint_weights
from lorafusion.train import export as exporting
from lorafusion.train.config import read_train_config
from lorafusion.train.prepare import base_model, prepare
from lorafusion.train.run import train
from tests.tiny_tokenizer import save_tokenizer


@pytest.fixture
def job(tmp_path):
    """The job of five samples in batches of two, so with three steps an epoch, that a jobs file makes."""

    def job(**keys):
        job = {"name": "a", "data": {"synthetic": {"samples": 5, "scale": 32}}, "global_batch_size": 2}
        path = tmp_path / "jobs.yaml"
        path.write_text(yaml.safe_dump({"model": "tiny", "output": "out", "jobs": [job | keys]}))
        config = read_train_config(path)
        (job,) = prepare(config, base_model(config), tmp_path / "run").jobs
        return job

    return job


@pytest.mark.parametrize(
    ("keys", "steps", "epochs", "told"),
    [
        ({}, 3, 1, ""),
        ({"epochs": 2}, 6, 2, ""),
        ({"steps": 500}, 500, 167, ""),
        ({"steps": 2}, 2, 1, ""),
        ({"steps": 3}, 3, 1, ""),
        ({"steps": 4}, 4, 2, ""),
        ({"steps": 500, "epochs": 1}, 3, 1, "a: 1 epoch(s) have 3 steps, steps is 500: epochs end(s) the job\n"),
        ({"steps": 4, "epochs": 2}, 4, 2, "a: 2 epoch(s) have 6 steps, steps is 4: steps end(s) the job\n"),
        ({"steps": 6, "epochs": 2}, 6, 2, ""),
        ({"steps": 4, "epochs": None}, 4, 2, ""),
    ],
)
def test_steps_are_made_as_asked_for_or_it_is_said(job, capsys, keys, steps, epochs, told):
    made = job(**keys)
    assert (len(made.batches), made.epochs) == (steps, epochs)
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("keys", "steps"), [({"steps": 1}, 1), ({}, 3), ({"epochs": 2}, 6), ({"steps": 500}, 500)])
def test_a_warm_up_that_never_ends_is_refused(job, tmp_path, schedule, keys, steps):
    for warmup in {0, steps // 2, steps - 1}:
        made = job(schedule=schedule, warmup_steps=warmup, learning_rate=0.5, **keys)
        assert max(made.learning_rate_at(step) for step in range(steps)) == 0.5
    for warmup in (steps, steps + 100):
        message = f"jobs.a: warmup_steps: {warmup}, but the job has {steps} step"
        with pytest.raises(UserError, match=rf"^{tmp_path}/jobs\.yaml: {message}"):
            job(schedule=schedule, warmup_steps=warmup, **keys)


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache, and no hub: of the repository acme/tiny two revisions, of which `v2` has a wider model."""
    cache = tmp_path / "cache"
    torch.manual_seed(0)
    for revision, width in (("main", 32), ("v2", 64)):
        folder = cache / "models--acme--tiny" / "snapshots" / (COMMITS[revision])
        config = LlamaConfig(hidden_size=width, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=258, max_position_embeddings=64)  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        save_tokenizer(folder)
        refs = cache / "models--acme--tiny" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / revision).write_text(COMMITS[revision])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(folder: Path, **keys):
    job = {"name": "a", "data": {"jsonl": "rows.jsonl", "completion": "{x}"}}
    (folder / "rows.jsonl").write_text('{"x": "one"}\n')
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"model": "acme/tiny", "output": "out", "jobs": [job]} | keys))
    return read_train_config(path)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Exports an adapter without weights to the folder `adapter`; returns its adapter_config.json."""
    monkeypatch.setattr(exporting, "save_adapter", lambda config, weights, folder: config.save_pretrained(folder))

    def exported(job, model) -> dict:
        folder = tmp_path / "adapter"
        exporting.export(job, model, {}, {}, stopped=False, others=0, folder=folder)
        return json.loads((folder / "adapter_config.json").read_text())

    return exported


@pytest.mark.parametrize(("revision", "width"), [(None, 32), ("v2", 64), (COMMITS["v2"], 64)])
def test_a_revision_in_the_hubs_cache_is_trained_and_named(hub, tmp_path, exported, revision, width):
    config = cached(tmp_path, **({"revision": revision} if revision else {}))
    model = base_model(config)
    assert (model.hidden_size, model.weights, model.revision) == (width, "acme/tiny", revision)
    fill = checkpoint_weights(model)
    assert fill("model.norm.weight", torch.Size([width]), torch.device("cpu"), torch.float32).shape == (width,)
    (job,) = prepare(config, model, tmp_path / "run").jobs
    described = exported(job, model)
    assert (described["base_model_name_or_path"], described["revision"]) == ("acme/tiny", revision)
    assert ("revision v2" in (tmp_path / "adapter" / "README.md").read_text()) == (revision == "v2")


def test_random_weights_are_of_no_revision(hub, tmp_path, exported, make_job):
    model = base_model(cached(tmp_path, revision="v2", weights="random"))
    described = exported(make_job(), model)
    assert (described["base_model_name_or_path"], described["revision"]) == (None, None)


def test_weights_that_the_cache_has_not_are_one_line(hub, tmp_path):
    model = base_model(cached(tmp_path, revision="v2"))
    (hub / "models--acme--tiny" / "snapshots" / COMMITS["v2"] / "model.safetensors").unlink()
    with pytest.raises(UserError, match="'acme/tiny': neither a local folder nor to be had from the hub"):
        checkpoint_weights(model)
    with pytest.raises(UserError, match="model 'acme/tiny': neither a local folder nor to be had"):
        base_model(cached(tmp_path, revision="v3"))
    shutil.rmtree(hub / "models--acme--tiny")
    with pytest.raises(UserError, match="model 'acme/tiny': neither a local folder nor to be had"):
        base_model(cached(tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epochs": 10**9}, "epochs: input should be less than or equal to 10000"),
        ({"epochs": 10**30}, "epochs: input should be less than or equal to 10000"),
        ({"steps": 10**9}, "steps: 1000000000 need 333333334 epochs of 5 samples, expected 10000 at most"),
        ({"steps": 10**30}, "steps: input should be less than or equal to 1000000000"),
        ({"rank": 10**9}, "rank: input should be less than or equal to 256"),
        ({"global_batch_size": 10**12}, "global_batch_size: input should be less than or equal to 1000000"),
        ({"data": {"synthetic": {"samples": 10**9}}}, "samples: input should be less than or equal to 1000000"),
        ({"data": {"synthetic": {"samples": 2000}}, "epochs": 10_000}, "20000000 samples of all of them, expected 1"),
    ],
)
def test_counts_that_nobody_can_wait_for_are_refused_with_the_number(job, keys, message):
    with pytest.raises(UserError) as caught:
        job(**keys)
    assert message in str(caught.value)


def test_what_is_refused_late_leaves_nothing_behind(tmp_path):
    """A row that cannot be used, of which nobody can know before it is read."""
    save_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "jobs.yaml"
    data = {"jsonl": "rows.jsonl", "completion": "{x}"}
    top = {"model": "tiny", "tokenizer": "tokenizer", "output": "out", "jobs": [{"name": "a", "data": data}]}
    path.write_text(yaml.safe_dump(top))
    (tmp_path / "rows.jsonl").write_text('{"x": "one"}\n{"y": "two"}\n')
    for is_there in (False, True):
        if is_there:
            (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match=r"rows\.jsonl:2: no field 'x'; found y"):
            train(path)
        assert (tmp_path / "out").is_dir() == is_there
        assert list((tmp_path / "out").glob("*")) == []
