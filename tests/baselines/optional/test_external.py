"""The released mLoRA is given files of its form, and its log is read. A stand-in checks the former and writes the
latter; the real one needs a GPU and an environment of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from baselines.mlora import external
from tests.conftest import job, workload
from tests.tiny_tokenizer import save_tokenizer

STAND_IN = """
import argparse, json, sys, yaml
from datetime import datetime, timedelta

parser = argparse.ArgumentParser()
for name in ("--base_model", "--config", "--precision", "--metric_file"):
    parser.add_argument(name, required=True)
options = parser.parse_args()
with open(options.config) as file:
    config = yaml.safe_load(file)
assert config["dispatcher"] == {"name": "default", "concurrency_num": len(config["tasks"])}
datasets, adapters = ({one["name"]: one for one in config[key]} for key in ("datasets", "adapters"))
tasks = []
for task in config["tasks"]:
    assert task["type"] == "train"
    adapter, dataset = adapters[task["adapter"]], datasets[task["dataset"]]
    assert adapter["type"] == "lora" and adapter["optimizer"] == "adamw" and adapter["path"]
    assert adapter["dropout"] > 0 and isinstance(adapter["alpha"], int) and adapter["r"] > 0 and float(adapter["lr"])
    assert all(isinstance(value, bool) for value in adapter["target_modules"].values())
    assert task["batch_size"] == task["mini_batch_size"] and task["cutoff_len"] <= 4096 and task["save_step"]
    assert dataset["prompt_type"] == "instruction" and dataset["preprocess"] == "default"
    with open(dataset["prompt"]) as file:
        assert "data_point['text']" in yaml.safe_load(file)["template"]
    with open(dataset["data"]) as file:
        tasks.append({"task": task, "size": len(json.load(file)), "epoch": 1, "index": 0, "step": 1})

now = datetime(2025, 1, 1, 23, 59, 59, 500000)


def say(text):
    print(f"[{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d}] m-LoRA: {text}", file=sys.stderr)


say("NVIDIA CUDA initialized successfully.")
while tasks:
    for one in tasks:
        task = one["task"]
        say(f"Adapter {task['adapter']} epoch: {one['epoch']}/{task['num_epochs']} "
            f"iteration: {one['index']}/{one['size']} step: {one['step']}")
    now += timedelta(seconds=2)
    for one in tasks:
        say(f"Adapter {one['task']['adapter']} loss: {4 / one['step']}")
        one["step"] += 1
        one["index"] += one["task"]["mini_batch_size"]
        if one["index"] >= one["size"]:
            one["epoch"], one["index"] = one["epoch"] + 1, 0
    for one in [one for one in tasks if one["epoch"] > one["task"]["num_epochs"]]:
        say(f"Finish and base model offload adapter - ['{one['task']['adapter']}']")
        tasks.remove(one)
"""
LONG = job("long", (5000, 9, 3), epochs=2, dropout=0.1, target_modules=("q_proj", "down_proj"), learning_rate=1e-5)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout that stands in for mLoRA, an interpreter, a model's tokenizer and a workload."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mlora_train.py").write_text(STAND_IN)
    monkeypatch.setenv("LORAFUSION_MLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAFUSION_MLORA_PYTHON", sys.executable)
    save_tokenizer(tmp_path / "model")
    (tmp_path / "w.json").write_text(workload(job("a", weight_decay=0.1, alpha=8.5), LONG).to_json())
    return tmp_path


def started(place: Path) -> int:
    return external.main([str(place / "w.json"), "--model", str(place / "model"), "--out", str(place / "r.json")])


def test_a_workload_is_trained_and_its_log_read(place):
    assert started(place) == 0
    result = json.loads((place / "r.json").read_text())
    # Job a has 5 samples in batches of 2: 3 steps; the other 3 samples in batches of 2, twice: 4 steps.
    assert result["losses"] == {"a": [4.0, 2.0, 4 / 3], "long": [4.0, 2.0, 4 / 3, 1.0]}
    assert result["iterations"] == 4
    rows = [(5, 3, 4096, 9), (8, 2, 3), (6, 4096, 9), (3,)]
    assert result["tokens"] == sum(map(sum, rows))
    assert result["tokens_padded"] == 4 * 4096 + 3 * 8 + 3 * 4096 + 8
    assert result["seconds"] == 6.0
    assert result["throughput"] == (13 + 4111 + 3) / 6
    assert result["throughput_padded"] == (3 * 8 + 3 * 4096 + 8) / 6
    notes = "\n".join(result["notes"])
    for note in (
        "1 samples are cut to 4096 tokens",
        "dropout 1e-06 in place of 0, which it refuses: a",
        "ignored of a, as mLoRA has none: weight_decay, the fraction of alpha",
        "not at 4abf120",
    ):
        assert note in notes
    assert "--precision bf16" in result["command"]


def test_texts_and_config_are_those_of_the_workload(place):
    assert started(place) == 0
    folder = place / "r.mlora"
    # Each byte is a token of this tokenizer; <bos> and <eos> come on top.
    assert [len(one["text"]) + 2 for one in json.loads((folder / "long.json").read_text())] == [4096, 9, 3]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    modules = config["adapters"][1]["target_modules"]
    assert [name for name, wanted in modules.items() if wanted] == ["q_proj", "down_proj"]
    assert [config["adapters"][1][key] for key in ("r", "alpha", "dropout", "lr")] == [4, 8, 0.1, 1e-5]
    assert [config["tasks"][1][key] for key in ("batch_size", "num_epochs")] == [2, 2]


def test_a_run_that_fails_is_one_line_with_the_last_one_of_its_log(place, capsys):
    (place / "home" / "mlora_train.py").write_text("import sys; print('m-LoRA requires CUDA'); sys.exit(1)")
    assert started(place) == 2
    assert capsys.readouterr().err.strip().endswith("log.txt: mLoRA ended with status 1: m-LoRA requires CUDA")
    assert not (place / "r.json").exists()


def test_a_log_with_steps_missing_is_no_result(place, capsys):
    path = place / "home" / "mlora_train.py"
    path.write_text(STAND_IN.replace("while tasks:", "for _ in range(2):"))
    assert started(place) == 2
    assert "adapter a: expected 3 steps, found 2, with 2 losses" in capsys.readouterr().err


MISTAKES = {
    "no home": ({"LORAFUSION_MLORA_HOME": None}, "LORAFUSION_MLORA_HOME: not set"),
    "no interpreter": ({"LORAFUSION_MLORA_PYTHON": None}, "LORAFUSION_MLORA_PYTHON: not set"),
    "another folder": ({"LORAFUSION_MLORA_HOME": "/"}, "LORAFUSION_MLORA_HOME: / has no mlora_train.py"),
    "no program": ({"LORAFUSION_MLORA_PYTHON": "/etc"}, "LORAFUSION_MLORA_PYTHON: /etc is not a program"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_missing_installation_is_one_line_and_status_2(place, name, monkeypatch, capsys):
    changes, message = MISTAKES[name]
    for variable, value in changes.items():
        monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    assert started(place) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {message}")
    assert "\n" not in error


def test_what_mlora_cannot_train_is_refused(place, capsys):
    (place / "w.json").write_text(workload(job("a", steps=1)).to_json())
    assert started(place) == 2
    assert "job 'a': mLoRA trains whole epochs" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(place, capsys):
    (place / "model").rename(place / "gone")
    assert started(place) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_a_tokenizer_without_a_token_that_mlora_adds_is_refused(place, capsys):
    save_tokenizer(place / "model", eos=None)
    assert started(place) == 2
    assert "this tokenizer lacks one" in capsys.readouterr().err
