"""What a run takes of a GPU's memory, counted without a GPU: weights, adapters, activations, logits.

`planning.capacity` lists who else says how many tokens a microbatch may hold.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lorafusion.core.config import ModelConfig
from lorafusion.planning.capacity import STEP, USABLE, rounded_down
from lorafusion.planning.simulator.costs import GRADIENT_BYTES, CapturedCosts, CostModel

WORKSPACE = 2 << 30  # bytes: products on their way
ADAPTER_BYTES = 4 * GRADIENT_BYTES  # itself, its gradient, AdamW's two moments
LOGIT_BYTES = 2 + 4 + 4 + 2  # of a logit: in 16 bits, in float32 for the loss, and the gradients of both
GIB = 1 << 30


def saved_bytes(config: ModelConfig, checkpointing: bool = False) -> float:
    """Bytes of a token that a decoder layer keeps for its backward pass, in 16 bits with the fused kernels.

    Seven tensors as wide as the model and two as wide as the MLP, and a bit an element of the linears' inputs as
    dropout masks: within 1 % of what layers of three models kept (results/reference/nvidia-h200/kernels.parquet).
    Checkpointing keeps a layer's input alone.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    if checkpointing:
        return 2 * hidden
    return 2 * (7 * hidden + 2 * inner) + (6 * hidden + inner) / 8


class PipelineMemory(NamedTuple):
    """The memory of each GPU of a pipeline. model: tells the layers of its stages, and whether they replay graphs;
    memory: bytes of a GPU; labels: the largest share of a microbatch's tokens that have one, of which alone logits are
    made."""

    config: ModelConfig
    model: CostModel
    memory: int
    checkpointing: bool = False
    labels: float = 1.0

    def weights(self, stage: int) -> int:
        """Bytes of a stage's weights in 16 bits."""
        config, last = self.config, self.model.stages - 1
        tables = (stage == 0) + (stage == last and not (config.tie_word_embeddings and stage == 0))
        layer = sum(inputs * outputs for inputs, outputs in config.linears.values())
        return 2 * (self.model.layers[stage] * layer + tables * config.vocab_size * config.hidden_size)

    def token(self, stage: int) -> float:
        """Bytes that a token of the capacity takes on a stage, of which 1F1B holds S - stage microbatches."""
        config, stages = self.config, self.model.stages
        kept = self.model.layers[stage] * saved_bytes(config, self.checkpointing) * (stages - stage)
        if self.checkpointing:
            # The layer that is computed again, with graphs in the pool of each microbatch in flight.
            kept += saved_bytes(config) * (stages - stage if isinstance(self.model, CapturedCosts) else 1)
        return kept + (self.labels * LOGIT_BYTES * config.vocab_size if stage == stages - 1 else 0)

    def used(self, parameters: int, tokens: int, stage: int) -> float:
        """Bytes that a stage takes with adapters of so many parameters in a layer, and microbatches of so many
        tokens."""
        adapters = ADAPTER_BYTES * parameters * self.model.layers[stage]
        return WORKSPACE + self.weights(stage) + adapters + tokens * self.token(stage)

    def most_used(self, parameters: int, tokens: int) -> int:
        """Bytes of the fullest GPU."""
        return int(max(self.used(parameters, tokens, stage) for stage in self._stages))

    def capacity(self, parameters: int) -> int:
        """The most tokens of a microbatch that fit on every stage beside adapters of so many parameters in a layer;
        below 1 where nothing does."""
        free = ((self._usable - self.used(parameters, 0, stage)) / self.token(stage) for stage in self._stages)
        return rounded_down(min(free))

    def parameters(self, tokens: int) -> int:
        """The most parameters of adapters in a layer beside which microbatches of so many tokens fit; below zero where
        none do."""
        tokens = -(-tokens // STEP) * STEP
        free = (
            (self._usable - self.used(0, tokens, stage)) / (ADAPTER_BYTES * self.model.layers[stage])
            for stage in self._stages
        )
        return int(min(free) // 1)

    def reason(self, parameters: int, longest: int) -> str:
        """Why an adapter of so many parameters in a layer does not fit with a sample of `longest` tokens; empty if it
        does."""
        if parameters <= self.parameters(longest):
            return ""
        if self._is_over(weights := [self.weights(stage) for stage in self._stages]):
            return f"the weights do not fit: {max(weights) / GIB:.1f} GiB"
        if self._is_over(self.used(0, 0, stage) for stage in self._stages):
            return f"the weights fit ({max(weights) / GIB:.1f} GiB), {WORKSPACE / GIB:.0f} GiB of workspace do not"
        alone = self.capacity(0)
        if alone < longest:
            return f"holds {max(alone, 0)} tokens even without adapters, a sample has {longest}"
        states = f"{ADAPTER_BYTES * parameters * max(self.model.layers) / GIB:.1f} GiB"
        if self._is_over(self.used(parameters, 0, stage) for stage in self._stages):
            return f"an adapter's states do not fit beside the weights: {states}"
        return f"an adapter's states ({states}) leave room for {self.capacity(parameters)} tokens, not for {longest}"

    @property
    def _stages(self) -> range:
        return range(self.model.stages)

    @property
    def _usable(self) -> float:
        return self.memory * USABLE

    def _is_over(self, used: Iterable[float]) -> bool:
        return max(used) > self._usable
