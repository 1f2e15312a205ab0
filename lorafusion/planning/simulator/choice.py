"""Which costs a plan uses: `SOURCES` are asked in their order, and the first answer is taken.

Everything that plans or simulates asks here: `plan`, `train`, the suites' plans and tunings, and the benches of the
planner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafusion.core.config import CONFIGS, ModelConfig, config_path, read_model
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job
from lorafusion.planning.simulator.costs import (
    CPU,
    H200,
    CostModel,
    adapter_parameters,
    even_costs,
    model_costs,
    over_replicas,
    read_cost_model,
)
from lorafusion.planning.simulator.profile import CostProfile, is_profile, read_profile, stage_costs

GPU = "cuda"
MACHINES = {"cpu": CPU, GPU: H200}  # what is taken for a device that nobody has profiled


@dataclass(frozen=True)
class Question:
    """What a plan is for. model: None where nothing is known of it. file: of costs, which the user names. machine: a
    name of configs/machines, that is looked at before all others. device: None for that of the file, or else a GPU.
    gpu_name: None where nobody has asked. jobs: those that step over so many replicas, where there are several."""

    stages: int
    model: ModelConfig | None = None
    file: Path | None = None
    machine: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    gpu_name: str | None = None
    implementation: str = "fused"
    checkpointing: bool = False
    data_parallel: int = 1
    jobs: Sequence[Job] = ()


def _of_file(question: Question) -> CostModel | None:
    """A cost model, which says its own layers, or a profile that must have what is asked for."""
    path = question.file
    if path is None:
        return None
    if not is_profile(path):
        return _of_stages(read_cost_model(path), question.stages, path)
    profile = read_profile(path)
    if question.model is None:
        raise UserError(f"{path}: a profile of {', '.join(_models(profile))}; expected a model beside it")
    for key in ("device", "gpu_name"):
        value, expected = getattr(profile, key), getattr(question, key)
        if expected is not None and value != expected:
            raise UserError(f"{path}: {key}: found {value}, expected {expected}, which the plan is for")
    fit = profile.require_fit(question.model, question.implementation, path)
    return stage_costs(fit, question.model, question.stages, question.checkpointing)


def _of_record(question: Question) -> CostModel | None:
    """A profile of configs/machines of this model and device; the one that is named, or one of the GPU that is here."""
    if question.model is None:
        return None
    if question.machine:
        paths = [config_path("machine", question.machine)]
    else:
        paths = sorted((CONFIGS / "machines").glob("*.yaml")) if question.gpu_name else []
    for profile in map(read_profile, paths):
        is_alike = profile.device == (question.device or GPU) and question.gpu_name in (None, profile.gpu_name)
        fit = profile.fit(question.model, question.implementation) if is_alike else None
        if fit:
            return stage_costs(fit, question.model, question.stages, question.checkpointing)
    return None


def _of_model(question: Question) -> CostModel | None:
    """By the model's FLOP."""
    if question.model is None:
        return None
    machine = MACHINES[question.device or GPU]
    return model_costs(question.model, question.stages, machine=machine, checkpointing=question.checkpointing)


SOURCES: tuple[Callable[[Question], CostModel | None], ...] = (
    _of_file,
    _of_record,
    _of_model,
    lambda question: even_costs(question.stages),
)


def costs_for(question: Question) -> CostModel:
    """The costs that a plan uses; `UserError` for a file that does not fit it."""
    return with_reduction(next(costs for source in SOURCES if (costs := source(question)) is not None), question)


def with_reduction(costs: CostModel, question: Question) -> CostModel:
    """The same costs, with those of summing gradients over the replicas of a question."""
    if question.model is None:  # and nothing is known of the gradients
        return costs
    parameters = [adapter_parameters(question.model, job) for job in question.jobs] or [0]
    return over_replicas(costs, question.model, sum(parameters) / len(parameters), question.data_parallel)


def chosen_costs(
    stages: int,
    model: str | None = None,
    costs: str | Path | None = None,
    data_parallel: int = 1,
    jobs: Sequence[Job] = (),
) -> CostModel:
    """The costs of a model of configs/models, of a file with a cost model, or of a model by a profile of it. Without
    them stages are of equal size. data_parallel, jobs: as in `Question`."""
    path = Path(costs) if costs else None
    if model and path and not is_profile(path):
        raise UserError(f"either a model or a file with costs, found both; {path} is no profile")
    base = read_model(model) if model else None
    return costs_for(Question(stages, base, path, data_parallel=data_parallel, jobs=jobs))


def _of_stages(model: CostModel, stages: int, source: Path) -> CostModel:
    if model.stages != stages:
        raise UserError(f"{source}: {model.stages} stages, expected {stages}")
    return model


def _models(profile: CostProfile) -> list[str]:
    return sorted({fit.model for fit in profile.fits})
