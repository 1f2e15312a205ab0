"""How a model's decoder layers are divided among pipeline stages; pure Python, as planning asks for it too."""

import math

from lorafusion.core.config import ModelConfig
from lorafusion.core.schema import UserError


def head_layers(config: ModelConfig) -> float:
    """What the head costs in decoder layers, by the FLOP of their products. The embedding, a lookup, costs nothing."""
    dense = sum(inputs * outputs for inputs, outputs in config.linears.values())
    return config.hidden_size * config.vocab_size / dense


def split_layers(layers: int, stages: int, head: float = 0.0) -> tuple[int, ...]:
    """Layers of each stage such that the slowest stage is as fast as can be; `head`: what the head costs, in layers."""
    if not 1 <= stages <= layers:
        raise UserError(f"{stages} stages, but the model has {layers} layers; each stage needs one")
    if stages == 1:
        return (layers,)
    best = min(
        range(1, layers - stages + 2),
        key=lambda last: (max(math.ceil((layers - last) / (stages - 1)), last + head), -last),
    )
    each, more = divmod(layers - best, stages - 1)
    return (*(each + (index < more) for index in range(stages - 1)), best)


def layer_range(config: ModelConfig, index: int, count: int) -> tuple[int, int]:
    """The layers [first, last) of stage `index` of `count`."""
    split = split_layers(config.num_hidden_layers, count, head_layers(config))
    first = sum(split[:index])
    return first, first + split[index]
