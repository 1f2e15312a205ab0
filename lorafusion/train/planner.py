"""What a run of `lorafusion train` is to be: its plan, by the capacity that is stated or measured, and its spec."""

import logging
from pathlib import Path

from lorafusion.core.config import ModelConfig, read_system
from lorafusion.core.files import write
from lorafusion.core.machine import gpu_state
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload, content_hash
from lorafusion.engine.memory_probe import MOST, Measured, capacity_of
from lorafusion.launch.launch import launch
from lorafusion.launch.lock import Lock
from lorafusion.launch.spec import PROBE_MEMORY, RunSpec, Saving
from lorafusion.planning import COMPLETION, plan_system
from lorafusion.planning.simulator import CostModel, Question, costs_for
from lorafusion.train.config import SYSTEM, TrainConfig
from lorafusion.train.folder import MODEL, OutputFolder, Run
from lorafusion.train.prepare import DATA

LOGGER = logging.getLogger(__name__)
CPU_CAPACITY = 2048  # tokens, where nothing is probed
LOG = "log.txt"  # in the output folder


class RunPlanner:
    """Plans the runs of one invocation of the command."""

    def __init__(self, config: TrainConfig, model: ModelConfig, output: OutputFolder, lock: Lock) -> None:
        self.config, self.model, self.output, self.lock = config, model, output, lock

    def plan(self, remaining: Workload) -> Plan:
        """The plan of what remains to be trained."""
        stages, graphs = self.config.stages, self._has_graphs(remaining)
        capacity, share = self._capacity(remaining, self.config.capacity, graphs)
        costs = self._costs(remaining, share)
        plan = plan_system(remaining, SYSTEM, stages=stages, capacity=capacity, aim=COMPLETION,
                           data_parallel=self.config.data_parallel, costs=costs, graphs=graphs)  # fmt: skip
        numbers = plan.statistics
        summary = f"{len(remaining.jobs)} jobs, {remaining.tokens} tokens in {numbers.microbatches} microbatches"
        LOGGER.info(f"{summary} of at most {capacity} tokens, fill {numbers.fill:.2f}")
        return plan

    def _has_graphs(self, workload: Workload) -> bool:
        """Are stages to replay graphs? Says why not, where that is not asked for. Raises `UserError` where graphs are
        asked for and do not fit."""
        config, reason = self.config, self.config.without_graphs(self.model)
        if config.graphs == "off":
            return False
        if not reason:
            try:
                self._capacity(workload, config.capacity, graphs=True)
            except UserError as error:
                reason = str(error)
        if reason and config.graphs == "auto":
            LOGGER.info(f"without graphs: {reason}")
        return config.uses_graphs(reason)

    def _costs(self, workload: Workload, share: float) -> CostModel:
        """Those of this machine. share: of the layers that recompute their activations."""
        device = self.config.chosen_device
        name = gpu_state()["gpu_name"] if device == "cuda" else None
        return costs_for(Question(
            self.config.stages, self.model, device=device, gpu_name=name if isinstance(name, str) else None,
            implementation=read_system(SYSTEM).implementation, checkpointing=share > 0,
            data_parallel=self.config.data_parallel, jobs=workload.jobs,
        ))  # fmt: skip

    def spec(self, run: Run) -> RunSpec:
        """The spec of a run's processes."""
        plan = Plan.read(run.plan)
        share = self._capacity(Workload.read(run.workload), plan.capacity, bool(plan.buckets))[1]
        settings = {"plan": str(run.plan), "tokens": str(self.output.path / DATA),
                    "saving": Saving(folder=str(run.checkpoints), every=self.config.save_every, keep=self.config.keep),
                    "events": str(run.events), "checkpointing": share,
                    "needs_graphs": self.config.graphs == "on"}  # fmt: skip
        return self.bare_spec(run).model_copy(update=settings)

    def bare_spec(self, run: Run) -> RunSpec:
        """A run's spec without what may differ when it goes on: its checkpoints are known by the rest."""
        initial = {"initial": str(run.initial)} if run.initial.exists() else {}
        return self._base_spec(run.workload).model_copy(update=initial)

    def _base_spec(self, workload: Path) -> RunSpec:
        config = self.config
        return RunSpec(system=SYSTEM, model=str(self.output.path / MODEL), workload=str(workload),
                       device=config.chosen_device, dtype=config.chosen_dtype, adapter_dtype=config.adapter_dtype,
                       seed=config.seed, checkpointing=0.0, attention=config.attention, lock=self.lock)  # fmt: skip

    def _capacity(self, workload: Workload, capacity: int | None, graphs: bool) -> tuple[int, float]:
        """Tokens of a microbatch, and the share of the layers that recompute their activations: stated, or measured by
        `engine.memory_probe`, or on a CPU, where memory is not short, a fixed one. (`planning.capacity` lists the other
        answers.) Raises `UserError` where the longest sample does not fit, or the graphs of what is stated."""
        share = self.config.recomputed_share
        samples = [sample for job in workload.jobs for sample in (*job.samples, *job.evaluation)]
        longest = max(sample.tokens for sample in samples)
        if self.config.chosen_device == "cpu":
            return capacity or max(CPU_CAPACITY, longest), share or 0.0
        if capacity and share is not None and not graphs:
            return capacity, share
        fitting, needed_share = capacity_of(self._measured(workload), longest, share, wanted=capacity, graphs=graphs)
        if graphs and capacity and fitting < min(capacity, MOST):
            raise UserError(f"capacity: graphs of microbatches of {capacity} tokens do not fit in the memory, of "
                            f"{fitting} they do")  # fmt: skip
        return capacity or fitting, needed_share

    def _measured(self, workload: Workload) -> list[Measured]:
        """What microbatches of these jobs take on each stage; measured once for the same adapters and GPU."""
        adapters = [job.model_dump(mode="json", include={"rank", "target_modules"}) for job in workload.jobs]
        key = content_hash([adapters, self.config.stages, gpu_state()["gpu_name"]])
        if key not in self.output.progress.probed:
            self.output.update(probed=self.output.progress.probed | {key: self._probed(workload)})
        return [Measured.from_json(stage) for stage in self.output.progress.probed[key]]

    def _probed(self, workload: Workload) -> list:
        LOGGER.info("measuring how many tokens a microbatch may hold")
        file, log_file = self.output.path / "probe.json", self.output.path / LOG
        write(file, workload.to_json())
        spec = self._base_spec(file).model_copy(update={"task": PROBE_MEMORY})
        with open(log_file, "a") as log:
            outcome = launch(spec, self.config.stages, stall=60 * self.config.stall_minutes, log=log)
        if outcome.status != "ok":
            raise UserError(f"capacity: could not be measured, {outcome.note}; state it, or see {log_file}")
        return outcome.report["stages"]
