"""What the operations of a run cost: a table of seconds, made by a function of what a microbatch holds.

A token's cost in a decoder layer is that of its GEMMs; attention adds a term in the square of a sample's length; the
last stage has the head besides. Tokens are a poor proxy for time where samples differ in length (the notes on the
authors' artifact, S11), which is why the scheduler judges an order by these costs.

A GPU is told what to do by its host, which takes as long for few tokens as for many. So a pass takes the longer of the
two times: a floor below which no microbatch is worth making smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from lorafusion.core.config import ModelConfig
from lorafusion.core.files import read_yaml
from lorafusion.core.plan import Microbatch, Plan
from lorafusion.core.schema import MOST_LAYERS, MOST_TOKENS, Config, UserError, validated
from lorafusion.core.workload import MERGED, MERGED_PARTS, Job, Workload
from lorafusion.planning.partition import head_layers, split_layers

# Measured on the H200 (results/reference/nvidia-h200/kernels.parquet, commit 09b1e6e): a decoder layer of Llama-3.1-70B
# with one adapter of rank 16 takes 2.94 us more for each further token forward, 6.08 both ways (a line through 2048 to
# 9728 tokens), which is 1.71 GFLOP a token each way.
FLOP_RATE = 583e12  # FLOP/s
BACKWARD = 1.07  # the backward pass over the forward's time: base weights have no gradients
ATTENTION_BACKWARD = 2.5  # its products over the forward's: five for two
ADAPTER_HIDDEN = 8192  # the hidden size of the model that `Machine.adapter` was measured with
GRADIENT_BYTES = 4  # of a parameter of an adapter, in float32
HIDDEN_BYTES = 2  # of a number of the hidden states


class Machine(NamedTuple):
    """What `model_costs` knows of a kind of device. flop_rate: FLOP/s; bandwidth: of a link, B/s; tile: rows of a
    GEMM's tile, which a microbatch's tokens are rounded up to; adapter: seconds of each adapter of a microbatch beyond
    the first in a layer of hidden size ADAPTER_HIDDEN, forward; the rest as in `CostModel`."""

    flop_rate: float
    bandwidth: float
    tile: int = 1
    fixed: float = 0.0
    adapter: float = 0.0
    host: float = 0.0
    host_adapter: float = 0.0
    host_backward: float = 1.0


# adapter: with 2048, 3584 and 8192 tokens 16 adapters took 75 to 85 us more for each than one did, both ways. Taken to
# grow with the hidden size. host: in 30 cells of the suite h200 no microbatch took less than 0.285 s, and 0.003 s for
# each further adapter, in 32 layers both ways; two fifths are taken to be the forward's.
H200 = Machine(FLOP_RATE, 300e9, tile=128, adapter=38e-6,
               host=0.4 * 0.285 / 32, host_adapter=0.4 * 0.003 / 32, host_backward=1.5)  # fmt: skip
# A few cores. What they do besides products is the same for each microbatch: about a millisecond a layer.
CPU = Machine(50e9, 1e9, fixed=1e-3)


@dataclass(frozen=True)
class Costs:
    """Seconds of a plan's operations, microbatches in plan order; zero for a no-op.

    forward, backward, step: float64 [stages, microbatches]. step: what follows the microbatch's backward where it ends
    an adapter's global batch, gradients reduced over the replicas included. transfer: float64 [microbatches], one way
    between two stages. cores: that the processors share; 0: each has a device of its own. Raises
    `UserError` for shapes that do not fit each other, and times below zero.
    """

    forward: np.ndarray
    backward: np.ndarray
    step: np.ndarray
    transfer: np.ndarray
    cores: int = 0

    def __post_init__(self) -> None:
        shape = self.forward.shape
        for name, value, expected in (
            ("backward", self.backward, shape),
            ("step", self.step, shape),
            ("transfer", self.transfer, shape[1:]),
        ):
            if value.shape != expected:
                raise UserError(f"costs: {name} has the shape {value.shape}, expected {expected} as of forward")
        for name in ("forward", "backward", "step", "transfer"):
            values = getattr(self, name)
            if values.size and not (np.isfinite(values).all() and values.min() >= 0):
                raise UserError(f"costs: {name} has times that are negative or not finite")

    @property
    def stages(self) -> int:
        return self.forward.shape[0]

    @property
    def microbatches(self) -> int:
        return self.forward.shape[1]


# Beyond these no cost is that of a machine, and sums of costs would no longer be numbers.
LEAST_TOKEN, MOST = 1e-15, 1e9
MOST_CORES = 1 << 20
Cost = Annotated[float, Field(ge=0, le=MOST)]


class LayerCosts(Config):
    """The costs of a base model's layers and head, as a function of a microbatch; times in seconds."""

    token: float = Field(ge=LEAST_TOKEN, le=MOST, description="of a token in a layer, forward")
    square: Cost = Field(default=0.0, description="of a squared token of a sample in a layer, forward")
    fixed: Cost = Field(default=0.0, description="of a microbatch in a layer, forward")
    microbatch: Cost = Field(default=0.0, description="of a microbatch on a stage besides, forward")
    head: Cost = Field(default=0.0, description="of a token on the last stage, forward: head and loss")
    backward: float = Field(default=BACKWARD, gt=0, le=MOST, description="backward over forward, of tokens")
    attention_backward: float = Field(
        default=ATTENTION_BACKWARD, gt=0, le=MOST, description="backward over forward, attention"
    )
    head_backward: Cost | None = Field(
        default=None, description="backward over forward, of the head; by default as of tokens"
    )
    fixed_backward: float | None = Field(
        default=None,
        ge=0,
        le=MOST,
        description="backward over forward, of microbatches and adapters; by default as of tokens",
    )
    checkpointing: bool = Field(default=False, description="the backward pass computes the forward of a layer again")
    adapter: Cost = Field(default=0.0, description="of each adapter beyond the first in a layer, forward")
    tile: int = Field(default=1, ge=1, le=MOST_TOKENS, description="tokens are rounded up to it")
    step: Cost = Field(default=0.0, description="of an adapter's optimizer step, for a layer")
    steps: Cost = Field(default=0.0, description="of the steps that follow a microbatch, on a stage besides")
    host: Cost = Field(default=0.0, description="of the host for a microbatch in a layer, forward")
    host_adapter: Cost = Field(default=0.0, description="of the host for each adapter beyond the first in it")
    host_adapter_backward: Cost | None = Field(
        default=None, description="the same, backward; by default as `host_backward` says"
    )
    host_microbatch: Cost = Field(default=0.0, description="of the host for a microbatch on a stage besides")
    host_backward: Cost = Field(default=1.0, description="backward over forward, of the host")
    reduction: Cost = Field(default=0.0, description="of an adapter's step in a layer: to sum over replicas")
    latency: Cost = Field(default=0.0, description="of a transfer between stages")
    transfer: Cost = Field(default=0.0, description="of a token between stages")
    cores: int = Field(default=0, ge=0, le=MOST_CORES, description="that processes share; 0: each has its own device")

    def layer(self, tokens: np.ndarray, squares: np.ndarray, adapters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of one layer for each microbatch, forward and backward; tokens, sums of squared sample lengths and
        numbers of adapters are arrays [microbatches]."""
        dense = self.token * (-(-tokens // self.tile) * self.tile)
        fixed = self.fixed * (tokens > 0) + self.adapter * np.maximum(adapters - 1, 0)
        attention = self.square * squares
        forward = dense + fixed + attention
        backward = self.backward * dense + self._ratio(self.fixed_backward) * fixed
        backward += self.attention_backward * attention
        return forward, backward + forward * self.checkpointing

    def _ratio(self, stated: float | None) -> float:
        """Backward over forward, of what may have none stated."""
        return self.backward if stated is None else stated

    def host_time(self, tokens: np.ndarray, adapters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the host for one layer of each microbatch, forward and backward, as `layer`."""
        more, stated = np.maximum(adapters - 1, 0), self.host_adapter_backward
        each = self.host_adapter * self.host_backward if stated is None else stated
        forward = (self.host + self.host_adapter * more) * (tokens > 0)
        backward = (self.host * self.host_backward + each * more) * (tokens > 0)
        return forward, backward + forward * self.checkpointing

    def host_besides(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the host for a microbatch besides its layers, forward and backward."""
        forward = self.host_microbatch * (tokens > 0)
        return forward, forward * self.host_backward

    def ends(self, tokens: np.ndarray, is_last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of what a stage does besides its layers, forward and backward, as `layer`: the head on the last one.
        is_last: of stages, in a shape that tokens can be multiplied with."""
        head, besides = is_last * (self.head * tokens), self.microbatch * (tokens > 0)
        return head + besides, self._ratio(self.head_backward) * head + self._ratio(self.fixed_backward) * besides


class CostModel(LayerCosts):
    """The costs of a base model on a number of stages."""

    layers: tuple[Annotated[int, Field(ge=1, le=MOST_LAYERS)], ...] = Field(
        min_length=1, description="decoder layers of each stage"
    )

    @property
    def stages(self) -> int:
        return len(self.layers)

    def divided(self, stages: int) -> CostModel:
        """The same costs, of the layers on another number of stages."""
        return self.model_copy(update={"layers": split_layers(sum(self.layers), stages, self.head / self.token)})

    def captured(self, buckets: Sequence[int] = ()) -> CapturedCosts:
        """The same stages where they replay graphs. buckets: rising, that microbatches are padded to."""
        host = {"host": 0.0, "host_adapter": 0.0, "host_adapter_backward": None, "host_microbatch": 0.0}
        return CapturedCosts(**self.model_dump() | host | {"buckets": tuple(buckets)})

    def costs(self, tokens: np.ndarray, squares: np.ndarray, adapters: np.ndarray, steps: np.ndarray) -> Costs:
        """The table for microbatches; steps: adapters whose last microbatch each is. A pass takes as long as the device
        or its host, whichever is slower."""
        layers = np.array(self.layers, float)[:, None]
        is_last = np.arange(self.stages)[:, None] == self.stages - 1
        of_layer, of_host = self.layer(tokens, squares, adapters), self.host_time(tokens, adapters)
        of_ends, of_host_besides = self.ends(tokens, is_last), self.host_besides(tokens)
        forward, backward = (
            np.maximum(layers * layer + end, layers * host + besides)
            for layer, end, host, besides in zip(of_layer, of_ends, of_host, of_host_besides, strict=True)
        )
        step = layers * (self.step + self.reduction) * steps + self.steps * (steps > 0)
        sent = np.where(tokens > 0, self.latency + self.transfer * tokens, 0.0)
        if self.cores:
            # A CPU carries messages itself, at both ends. Of a step there is one each way, with norms.
            neighbours = np.minimum(np.arange(self.stages)[:, None], 1) + 1 - is_last
            forward, backward = forward + neighbours * sent, backward + neighbours * sent
            step = step + 2 * neighbours * self.latency * (steps > 0)
        return Costs(forward, backward, step, sent, self.cores)


class CapturedCosts(CostModel):
    """The costs of stages that replay graphs, for which no device waits for its host."""

    buckets: tuple[int, ...] = Field(default=(), description="rising; a microbatch that none holds is not padded")

    def costs(self, tokens: np.ndarray, squares: np.ndarray, adapters: np.ndarray, steps: np.ndarray) -> Costs:
        """As of any costs, of microbatches that are padded to the smallest bucket that holds them."""
        padded = np.array([*self.buckets, np.inf])[np.searchsorted(self.buckets, tokens)]
        padded = np.where((tokens > 0) & np.isfinite(padded), padded, tokens)
        return super().costs(padded, squares + (padded - tokens) ** 2, adapters, steps)


def costs_of(plan: Plan, workload: Workload | None, model: CostModel) -> Costs:
    """A plan's table; without its workload each microbatch counts as samples of no length for attention.

    Raises `UserError` where the model has another number of stages than the plan."""
    if model.stages != plan.stages:
        raise UserError(f"cost model: {model.stages} stages, but the plan has {plan.stages}")
    return (model.captured() if plan.buckets else model).costs(*contents_of(plan, workload))


def contents_of(plan: Plan, workload: Workload | None) -> list[np.ndarray]:
    """What `CostModel.costs` asks of a plan's microbatches."""
    held = [_contents(microbatch, workload) for microbatch in plan.microbatches]
    return [np.array(column, float) for column in zip(*held, strict=True)]


def _contents(microbatch: Microbatch, workload: Workload | None) -> tuple[int, int, int, int]:
    """Tokens with their padding, their squares by sample, adapters, and adapters that step."""
    squares = 0
    if microbatch.row_tokens is not None:
        squares = microbatch.rows * microbatch.row_tokens**2
    elif workload is not None:
        for segment in microbatch.segments:
            job = workload.jobs[segment.adapter]
            squares += sum(tokens**2 for tokens in job.lengths_at(segment.samples))
    return microbatch.length, squares + microbatch.padding**2, len(microbatch.segments), len(microbatch.step_after)


def even_costs(stages: int) -> CostModel:
    """Costs of stages of equal size, where nothing else is known: a token's is 1, and attention's share is that of
    Llama-3.1-70B, 4 % for a sample of 4096 tokens."""
    return CostModel(layers=(1,) * stages, token=1.0, square=1e-5)


def model_costs(config: ModelConfig, stages: int, *, machine: Machine = H200, checkpointing: bool = False) -> CostModel:
    """The cost model of a base model by its FLOP: those of the GEMMs, of causal attention and of the head, at the rate
    that a decoder layer reached on a machine, and hidden states in 16 bits over its links."""
    hidden = config.hidden_size
    dense = 2 * sum(inputs * outputs for inputs, outputs in config.linears.values())
    return CostModel(
        layers=split_layers(config.num_hidden_layers, stages, head_layers(config)),
        token=dense / machine.flop_rate,
        fixed=machine.fixed,
        square=2 * hidden / machine.flop_rate,  # two products of 2 h FLOP for each pair of tokens, half of them masked
        head=2 * hidden * config.vocab_size / machine.flop_rate,
        checkpointing=checkpointing,
        adapter=machine.adapter * hidden / ADAPTER_HIDDEN,
        tile=machine.tile,
        step=30e-6,
        host=machine.host,
        host_adapter=machine.host_adapter,
        host_backward=machine.host_backward,
        latency=10e-6,
        transfer=HIDDEN_BYTES * hidden / machine.bandwidth,
    )


def adapter_parameters(config: ModelConfig, job: Job) -> int:
    """Parameters of a job's adapter in a decoder layer."""
    shapes = config.linears
    shapes[MERGED] = (config.hidden_size, sum(shapes[part][1] for part in MERGED_PARTS))
    return job.rank * sum(sum(shapes[name]) for name in job.target_modules if name in shapes)


def over_replicas(
    model: CostModel, config: ModelConfig, parameters: float, replicas: int, link: float | None = None
) -> CostModel:
    """The same costs, with those of summing an adapter's gradients over replicas at each of its steps.

    The sum goes around a ring, in which each replica sends nearly twice the gradients' bytes. A time that the costs
    state already is kept. parameters: of an adapter in a layer, on average; link: B/s of a replica to the next one, by
    default as fast as hidden states go from stage to stage, or an H200's where that takes no time."""
    if replicas == 1 or model.reduction:
        return model.model_copy(update={"reduction": model.reduction * (replicas > 1)})
    byte = 1 / link if link else model.transfer / (HIDDEN_BYTES * config.hidden_size) or 1 / H200.bandwidth
    message = GRADIENT_BYTES * parameters / replicas * byte + model.latency * model.stages / sum(model.layers)
    return model.model_copy(update={"reduction": 2 * (replicas - 1) * message})


def read_cost_model(path: str | Path) -> CostModel:
    """A cost model from a YAML file; `UserError` names the file and the key that is wrong."""
    return validated(CostModel, read_yaml(path), path)
