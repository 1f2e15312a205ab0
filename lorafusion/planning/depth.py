"""What the number of stages decides of a pipeline: its memory, and how long jobs take in it at least."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from lorafusion.core.workload import Job
from lorafusion.planning.memory import PipelineMemory
from lorafusion.planning.simulator.costs import CostModel


class Depth:
    """What the number of stages decides. seconds: of each job's passes on the busiest stage, all on one replica."""

    def __init__(self, jobs: tuple[Job, ...], memory: PipelineMemory) -> None:
        self.memory, self.model = memory, memory.model
        self.stages, model = self.model.stages, self.model
        of_last = model.layers[-1] + model.head / model.token >= max(model.layers)
        stage = {"layers": model.layers[-1:]} if of_last else {"layers": model.layers[:1], "head": 0.0}
        self.busiest = model.model_copy(update=stage)
        self.batch_samples = np.array([job.global_batch_size for job in jobs], float)
        self.steps = np.array([len(job.batches) - job.start for job in jobs], float)
        self.tokens = np.array([job.tokens for job in jobs], float)
        squares = [sum(sample.tokens**2 for sample in job.samples) / job.token_offsets[-1] for job in jobs]
        self.squares = self.tokens * squares
        self.seconds = self._passes(self.tokens, self.squares)

    def _passes(self, tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Seconds of microbatches of one adapter on the busiest stage, both ways."""
        table = self.busiest.costs(tokens, squares, np.ones(len(tokens)), np.zeros(len(tokens)))
        return (table.forward + table.backward)[0]

    def alone(self, replicas: int) -> np.ndarray:
        """Seconds that each job takes in a group alone, without its optimizer steps: a global batch is divided among
        the replicas, and into as many microbatches of equal size as is best against waiting."""
        sharing = np.minimum(replicas, self.batch_samples)
        most = np.ceil(self.batch_samples / replicas)
        best = np.full(len(self.steps), math.inf)
        for power in range(int(most.max()).bit_length()):
            microbatches = np.minimum(2.0**power, most)
            parts = self.steps * sharing * microbatches
            passes = self._passes(self.tokens / parts, self.squares / parts)
            best = np.minimum(best, passes * (microbatches + self.stages - 1))
        return best * self.steps


def useful_depths(most: int, costs: Callable[[int], CostModel]) -> Iterator[CostModel]:
    """The cost models of 1, 2, ... stages, without those whose busiest stage is as large as with fewer."""
    largest = math.inf
    for stages in range(1, most + 1):
        model = costs(stages)
        busiest = max((max(model.layers), model.layers[-1] + model.head / model.token))
        if busiest < largest:
            largest = busiest
            yield model
