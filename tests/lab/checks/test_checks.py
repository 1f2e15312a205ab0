"""The system against itself and against others, by real runs: several adapters, one and more stages."""

from __future__ import annotations

import functools

import pytest

from lorafusion.core.workload import Workload
from lorafusion.lab.checks.comparison import LOSS_TOLERANCE, WEIGHT_TOLERANCE
from lorafusion.lab.checks.learning import learning
from lorafusion.lab.checks.lossless import lossless
from lorafusion.lab.checks.toy_runs import TrainingResult, toy_jobs, train
from lorafusion.lab.suite import Arrangement
from lorafusion.launch.launch import launch
from lorafusion.model.lora import peft_config

pytestmark = pytest.mark.usefixtures("forked_runs")
WITHOUT_DROPOUT = Workload(name="toy", jobs=toy_jobs(dropout=0.0))


@functools.cache
def plain() -> TrainingResult:
    """One process, one adapter after another, PEFT's own forward: what every system must equal."""
    return train(WITHOUT_DROPOUT, "peft")


def test_adapters_trained_together_equal_each_alone_and_plain_training():
    verdict, _ = lossless([Arrangement.read(text) for text in ("1x1", "2x1", "1x2", "2x1+recompute")])
    assert verdict.passed, verdict.figures


def test_the_check_sees_dropout_that_depends_on_the_neighbours():
    """mLoRA's arm draws its masks from the process's generator, so alone and together they differ."""
    verdict, _ = lossless([Arrangement.read("1x1")], system="mlora")
    assert not verdict.passed
    assert verdict.figures["trained as 1x1: relative difference of a loss"] > 1e-3


def test_adapters_learn():
    verdict = learning()
    assert verdict.passed, verdict.figures


@pytest.mark.parametrize(
    ("system", "stages"), [("mlora", 1), ("mlora", 2), ("megatron-pp", 1), ("megatron-pp", 2), ("lorafusion", 4)]
)
def test_every_system_trains_what_plain_training_trains(system, stages):
    """Without dropout: the same losses, step for step, and the same adapters, whatever the order and the cut."""
    trained, expected = train(WITHOUT_DROPOUT, system, Arrangement(stages, 1, False)), plain()
    for job in WITHOUT_DROPOUT.jobs:
        assert trained.losses[job.name] == pytest.approx(expected.losses[job.name], rel=LOSS_TOLERANCE)
        assert trained.weights[job.name].keys() == expected.weights[job.name].keys()
        for name, tensor in expected.weights[job.name].items():
            difference = (trained.weights[job.name][name] - tensor).norm()
            assert difference <= WEIGHT_TOLERANCE * tensor.norm(), name


@pytest.mark.parametrize("system", ["lorafusion", "mlora"])
def test_recomputed_activations_are_those_of_their_own_microbatch(system):
    """With two stages another microbatch's forward lies between a forward and its recomputation."""
    trained = train(WITHOUT_DROPOUT, system, Arrangement(2, 1, True))
    for job in WITHOUT_DROPOUT.jobs:
        assert trained.losses[job.name] == pytest.approx(plain().losses[job.name], rel=LOSS_TOLERANCE)


def test_a_real_run_computes_what_a_forked_one_computes(monkeypatch):
    """Bit for bit: what the tests here leave out is imports and nothing else."""
    workload = Workload(name="toy", jobs=toy_jobs())
    forked = train(workload, "lorafusion", Arrangement(2, 1, False))
    monkeypatch.setattr("lorafusion.lab.checks.toy_runs.launch", launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    real = train(workload, "lorafusion", Arrangement(2, 1, False))
    assert real.losses == forked.losses
    for job in workload.jobs:
        assert real.weights[job.name].keys() == forked.weights[job.name].keys()
        assert all(tensor.equal(forked.weights[job.name][name]) for name, tensor in real.weights[job.name].items())


def test_the_adapters_are_in_pefts_format(tmp_path):
    """PeftModel loads a trained adapter onto the whole Hugging Face model, every tensor of it."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from lorafusion.core.config import read_model
    from lorafusion.model.stage import hf_config

    job = WITHOUT_DROPOUT.jobs[0]
    state = {name: tensor.float() for name, tensor in plain().weights[job.name].items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    peft_config(job).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_config(hf_config(read_model("tiny")))
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path))
    assert loaded.keys() == state.keys()
    assert all((loaded[name] == state[name]).all() for name in state)
