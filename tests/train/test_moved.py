"""A base model is what is in its folder, not where the folder lies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.model.stage import hf_config
from lorafusion.train import run as training
from lorafusion.train.run import DONE, STOPPED, train
from tests import forked
from tests.train import playback


@pytest.fixture
def jobs_file(tmp_path) -> Path:
    """Of a base model with weights, in a folder `model` beside it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf_config(read_model("tiny"))).save_pretrained(tmp_path / "model")
    return playback.jobs_file(tmp_path, model="model")


def stopped(path: Path, monkeypatch) -> int:
    """The status of a training that is asked to stop half-way."""

    def launch(spec, processes, look, **options):
        once = forked.once_before(4, Path(spec.saving.folder), processes, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return forked.launch(spec, processes, look=lambda: (look(), once()), **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "launch", launch)
        return train(path)


def test_a_training_goes_on_where_its_models_folder_was_moved(jobs_file, monkeypatch, capsys):
    assert stopped(jobs_file, monkeypatch) == STOPPED
    folder = jobs_file.parent
    (folder / "model").rename(folder / "moved")
    jobs_file.write_text(jobs_file.read_text().replace("model: model", "model: moved"))
    monkeypatch.setattr(training, "launch", forked.launch)
    assert train(jobs_file) == DONE
    assert "passed over" not in capsys.readouterr().err
    assert len(list((folder / "out/runs").iterdir())) == 1
    for job in ("short", "long"):
        card = (folder / "out/adapters" / job / "README.md").read_text()
        assert str(folder) not in card
        assert f"A LoRA adapter of the model in a folder {'moved' if job == 'long' else 'model'}, " in card
        assert yaml.safe_load(card.split("---\n")[1]) == {"library_name": "peft", "tags": ["lora", "lorafusion"]}

    (weights,) = (folder / "moved").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="out: begun with a model whose weights have other values; take another output"):
        train(jobs_file)
    content[-1] ^= 1
    weights.write_bytes(content)
    config = json.loads((folder / "moved/config.json").read_text())
    (folder / "moved/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"out: begun with model\.rms_norm_eps 1e-05, now it is 0\.001"):
        train(jobs_file)
