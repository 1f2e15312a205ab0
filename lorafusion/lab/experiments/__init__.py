"""The experiments of the laboratory: each is a class, `EXPERIMENTS` has them by name."""

from lorafusion.lab.experiments.costs import Costs
from lorafusion.lab.experiments.end_to_end import EndToEnd
from lorafusion.lab.experiments.experiment import Experiment
from lorafusion.lab.experiments.grid import Grid
from lorafusion.lab.experiments.kernels import Kernels
from lorafusion.lab.experiments.planner import Planner
from lorafusion.lab.experiments.steps import Steps

REGISTERED = (EndToEnd(), Kernels(), Grid(), Steps(), Planner(), Costs())
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in REGISTERED}
