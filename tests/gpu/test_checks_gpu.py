"""The checks on the device that is measured: a step's gradients against float64, in every system, on the tiny model and
on two layers of Llama-3.1-8B; that they see what is wrong; losses and weights; and the dropout masks."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, keep_mask, mask_key, ops
from fused_lora.linear import operator_arguments
from fused_lora.philox import unpack
from lorafusion.core.config import read_systems
from lorafusion.lab import definitions
from lorafusion.lab.checks import gradients
from lorafusion.lab.checks.learning import learning
from lorafusion.lab.checks.lossless import lossless
from lorafusion.lab.checks.systems import possible, systems
from lorafusion.lab.checks.toy_runs import Setup, toy_jobs
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.suite import Arrangement
from tests import forked
from tests.training_faults import FAULTS, launched_here

SYSTEMS = [name for name, system in read_systems().items() if not unavailable(system)]
TINY = Setup(device="cuda", dtype="bfloat16", stretch=4)
LAYERS = Setup("llama-3.1-8b", 2, "cuda", "bfloat16", stretch=40)
SETUPS = pytest.mark.parametrize("setup", [TINY, LAYERS], ids=["tiny", "llama"])
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two GPUs")

expected = functools.cache(gradients.ExpectedGradients.of)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs are in this process."""
    monkeypatch.setattr("lorafusion.lab.checks.toy_runs.launch", partial(launched_here, folder=tmp_path))


@pytest.fixture
def apart(monkeypatch):
    """Runs are in processes of their own."""
    monkeypatch.setattr("lorafusion.lab.checks.toy_runs.launch", forked.launch)


def errors(system: str, setup: Setup, arrangement: str = "1x1", dropout=0.0, merged=False):
    where = possible(Arrangement.read(arrangement), read_systems()[system])
    wanted = expected(setup, dropout, merged)
    found = wanted.errors(gradients.one_step(system, where, setup, wanted).gradients)
    print(f"{system} as {where}, dropout {dropout}, merged {merged}, {setup}: {found}")
    return found


def assert_right(*arguments, **options) -> None:
    error, length = errors(*arguments, **options)
    assert error <= gradients.MOST_ERROR
    assert length <= gradients.MOST_LENGTH_ERROR


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_has_the_gradients_of_float64(apart, system, merged):
    assert_right(system, TINY, merged=merged)


@pytest.mark.parametrize("system", ["lorafusion", "fused-sequential", "mlora", "peft-bf16", "unfused-ours"])
def test_at_the_size_of_a_real_model_too(apart, system):
    assert_right(system, LAYERS)


@SETUPS
@pytest.mark.parametrize("arrangement", ["1x1", "1x1+recompute"])
def test_with_dropout_the_gradients_are_those_of_the_same_masks(here, setup, arrangement):
    assert_right("lorafusion", setup, arrangement, dropout=0.1)


@TWO
@SETUPS
@pytest.mark.parametrize("arrangement", ["2x1", "1x2", "2x1+recompute", "1x2+recompute"])
def test_two_gpus_have_the_gradients_of_one(apart, setup, arrangement):
    assert_right("lorafusion", setup, arrangement, dropout=0.1)


@TWO
@pytest.mark.parametrize("arrangement", ["2x1", "1x2", "2x1+recompute"])
@pytest.mark.parametrize("system", ["mlora", "megatron-pp", "megatron-fsdp", "fused-sequential"])
def test_two_gpus_have_the_gradients_of_one_in_other_systems(apart, system, arrangement):
    if unavailable(read_systems()[system]):
        pytest.skip(unavailable(read_systems()[system]))
    assert_right(system, TINY, arrangement)


@SETUPS
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_seen(here, monkeypatch, name, setup):
    FAULTS[name](monkeypatch)
    error, length = errors("lorafusion", setup, dropout=0.1)
    assert error > gradients.MOST_ERROR or length > gradients.MOST_LENGTH_ERROR


@SETUPS
@pytest.mark.parametrize("arrangements", ["1x1", pytest.param("2x1 1x2 2x1+recompute", marks=TWO)])
def test_adapters_trained_together_and_alone_are_as_near_to_float64_as_plain_training(apart, setup, arrangements):
    chosen = setup._replace(stretch=1) if setup is TINY else setup
    verdict, _ = lossless([Arrangement.read(text) for text in arrangements.split()], setups=[chosen])
    print(verdict.figures)
    assert verdict.passed, verdict.figures


def test_systems_train_what_plain_training_trains(apart):
    some = ["mlora", "peft-bf16", "unfused-sequential", "fused-mlora"]
    verdict = systems(some, Arrangement.read("1x1"), [Setup(device="cuda", dtype="bfloat16")])
    print(verdict.figures)
    assert verdict.passed, verdict.figures


def test_adapters_learn(apart):
    verdict = learning(setups=[Setup(device="cuda", dtype="bfloat16")])
    assert verdict.passed, verdict.figures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["with the projection", "by their own kernel"])
@pytest.mark.parametrize("offset", [0, 12345, 2**33 + 7])
@pytest.mark.parametrize("dropout", [0.1, 0.4])
def test_masks_drawn_on_the_gpu_are_those_of_their_definition(offset, dropout, dtype):
    """Bit for bit: those that kernels draw, and the reference's on the GPU."""
    job, columns, tokens = toy_jobs(dropout=dropout)[0], 4128, 257
    wanted = definitions.keep_mask(job, 3, "mlp.down_proj", offset, tokens, columns)
    key, positions = mask_key(job.seed, 3, "mlp.down_proj"), offset + torch.arange(tokens, device="cuda")
    assert torch.equal(keep_mask(key, positions, columns, job.dropout).cpu(), wanted)
    x, weight = (torch.randn(rows, columns, device="cuda", dtype=dtype) for rows in (tokens, 64))
    a, b = (torch.randn(shape, device="cuda", dtype=dtype) for shape in ((16, columns), (64, 16)))
    adapters = [[LoRAAdapter(a, b, 1.0, dropout, key)]]
    table, batch = AdapterTable.of(adapters, x.device), LoRABatch.of([LoRASegment(0, tokens, 0)], positions)
    arguments = operator_arguments(adapters, batch, table, training=True)
    _, _, bits = ops.KERNELS[ops.linear, "cuda"](*arguments, [x], [weight], [x.new_empty(0)], True)
    assert torch.equal(unpack(bits[0].cpu(), columns), wanted)
