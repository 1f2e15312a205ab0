"""The system against itself and against others, by real runs: several adapters, one and more stages."""

from __future__ import annotations

import functools

import pytest

from lorafusion.checks import LOSS_TOLERANCE, WEIGHT_TOLERANCE, Trained, lossless, toy_jobs, train
from lorafusion.models.lora import peft_config
from lorafusion.workload import Workload

WITHOUT_DROPOUT = Workload(name="toy", jobs=toy_jobs(dropout=0.0))


@functools.cache
def plain() -> Trained:
    """One process, one adapter after another, PEFT's own forward: what every system must equal."""
    return train(WITHOUT_DROPOUT, "peft", 1)


@pytest.mark.parametrize("stages", [1, 2])
def test_adapters_trained_together_equal_each_alone(stages):
    verdict = lossless(stages)
    assert verdict.passed, verdict.figures


def test_the_check_sees_dropout_that_depends_on_the_neighbours():
    """mLoRA's arm draws its masks from the process's generator, so alone and together they differ."""
    verdict = lossless(1, system="mlora")
    assert not verdict.passed
    assert verdict.figures["largest relative difference of a step's loss"] > 1e-3


@pytest.mark.parametrize(
    ("system", "stages"), [("mlora", 1), ("mlora", 2), ("megatron-pp", 1), ("megatron-pp", 2), ("lorafusion", 4)]
)
def test_every_system_trains_what_plain_training_trains(system, stages):
    """Without dropout: the same losses, step for step, and the same adapters, whatever the order and the cut."""
    trained, expected = train(WITHOUT_DROPOUT, system, stages), plain()
    for job in WITHOUT_DROPOUT.jobs:
        assert trained.losses[job.name] == pytest.approx(expected.losses[job.name], rel=LOSS_TOLERANCE)
        assert trained.weights[job.name].keys() == expected.weights[job.name].keys()
        for name, tensor in expected.weights[job.name].items():
            difference = (trained.weights[job.name][name] - tensor).norm()
            assert difference <= WEIGHT_TOLERANCE * tensor.norm(), name


@pytest.mark.parametrize("system", ["lorafusion", "mlora"])
def test_recomputed_activations_are_those_of_their_own_microbatch(system):
    """With two stages another microbatch's forward lies between a forward and its recomputation."""
    trained = train(WITHOUT_DROPOUT, system, 2, checkpointing=True)
    for job in WITHOUT_DROPOUT.jobs:
        assert trained.losses[job.name] == pytest.approx(plain().losses[job.name], rel=LOSS_TOLERANCE)


def test_the_adapters_are_in_pefts_format(tmp_path):
    """PeftModel loads a trained adapter onto the whole Hugging Face model, every tensor of it."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from lorafusion.config import read_model
    from lorafusion.models.stage import hf_config

    job = WITHOUT_DROPOUT.jobs[0]
    state = {name: tensor.float() for name, tensor in plain().weights[job.name].items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    peft_config(job).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_config(hf_config(read_model("tiny")))
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path))
    assert loaded.keys() == state.keys()
    assert all((loaded[name] == state[name]).all() for name in state)
