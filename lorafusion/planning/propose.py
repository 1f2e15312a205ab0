"""How to run a workload on some GPUs: groups of adapters, stages, replicas and capacity.

GPUs are divided into equal groups, each a pipeline of some stages with some replicas, and the adapters among them. What
each division would take at best is estimated first, in one pass over the jobs. The divisions that may be the best are
simulated then, by their slowest groups, with the largest capacity whose activations fit and below it with what `fast`
finds fastest. No GPU is asked: memory is counted (`planning.memory`), and time is the cost model's.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lorafusion.core.config import ModelConfig
from lorafusion.core.plan import Plan
from lorafusion.core.progress import progress
from lorafusion.core.schema import MOST_STAGES, UserError, one_of
from lorafusion.core.workload import Job, Workload
from lorafusion.planning.depth import Depth, useful_depths
from lorafusion.planning.fast import Prediction, Trials, plan
from lorafusion.planning.groups import distribute, makespan, nodes_of, places
from lorafusion.planning.memory import GIB, PipelineMemory
from lorafusion.planning.simulator import Timeline, simulate
from lorafusion.planning.simulator.costs import HIDDEN_BYTES, CostModel, adapter_parameters, costs_of, over_replicas

ALL_SIZES = 16  # numbers of groups and of replicas up to it are all tried; beyond it, each a sixth above the one before
NETWORK = 40e9  # B/s of a GPU each way, taken for 400 Gb/s InfiniBand
SHOWN, SHOWN_SPANNING = 8, 3  # divisions that are simulated at least, with groups on one node and on several
MOST_FURTHER = 20  # that may be faster by their estimates
CLOSE = 0.02  # of the estimated time, within which smaller groups are tried first; of GPU-hours, the faster ones
WIDER = 8  # the part of the groups that are added where the adapters' states did not fit
GAIN = 0.005  # of the time, for which a division is simulated
SIMULATED_GROUPS = 6  # the slowest of the division that seems the fastest; of the others, the slowest alone
SHOWN_SAMPLES = 1000  # of a timeline
SIMULATED_ADAPTERS = 128  # of a group, which fill any pipeline
PREFERENCES = THROUGHPUT, GPU_HOURS = ("throughput", "gpu-hours")


class Cluster(NamedTuple):
    """GPUs to use. memory: bytes of each; per_node: how many a node has; link, network: B/s of a GPU to another one of
    its node, by default as the costs say, and to those of other nodes."""

    gpus: int
    memory: int
    per_node: int = 8
    link: float | None = None
    network: float = NETWORK


class Choice(NamedTuple):
    """A way to run a workload: predicted tokens a second, seconds, bubble, bytes of the fullest GPU; or why it fails.

    at_once: groups that train at the same time; the others follow, where not all adapters fit at once. nodes: of a
    group. idle: GPUs in no group. members: the indices of each group's jobs; times: its seconds."""

    groups: int
    at_once: int
    stages: int
    data_parallel: int
    nodes: int
    idle: int
    capacity: int = 0
    largest_capacity: int = 0
    throughput: float = 0.0
    bubble: float = 0.0
    memory: int = 0
    makespan: float = 0.0
    gpu_hours: float = 0.0
    reason: str = ""
    members: tuple[tuple[int, ...], ...] = ()
    times: tuple[float, ...] = ()

    @property
    def slowest(self) -> int:
        """The group that ends last."""
        return self.times.index(max(self.times))


@dataclass
class _Division:
    """A way to divide the GPUs that fits. estimates: seconds of each group at best; predictions: of the groups that
    have been simulated."""

    groups: int
    at_once: int
    stages: int
    data_parallel: int
    members: list[list[int]]
    estimates: np.ndarray
    predictions: dict[int, Prediction] = field(default_factory=dict)
    simulated: dict[int, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.stages * self.data_parallel

    @cached_property
    def estimate(self) -> float:
        return makespan(self.estimates.tolist(), self.at_once)

    @property
    def estimated_work(self) -> float:
        """GPU-seconds at best."""
        return float(self.estimates.sum()) * self.size

    @property
    def work(self) -> float:
        """GPU-seconds."""
        return float(self.times.sum()) * self.size

    @property
    def makespan(self) -> float:
        return makespan(self.times.tolist(), self.at_once)

    @property
    def times(self) -> np.ndarray:
        """Seconds of each group: simulated, or estimated and as much longer as those that were simulated took."""
        longer = np.mean([seconds / self.estimates[group] for group, seconds in self.simulated.items()])
        times = self.estimates * longer
        times[list(self.simulated)] = list(self.simulated.values())
        return times


class Search:
    """The divisions of a cluster for a workload. costs: the cost model of the base model on so many stages; capacity:
    the most tokens of a microbatch that the user wants; prefer: one of PREFERENCES."""

    def __init__(
        self,
        workload: Workload,
        config: ModelConfig,
        cluster: Cluster,
        costs: Callable[[int], CostModel],
        checkpointing: bool = False,
        capacity: int | None = None,
        prefer: str = THROUGHPUT,
    ) -> None:
        one_of("preference", prefer, set(PREFERENCES), "plan propose")
        self.cheap = prefer == GPU_HOURS
        self.jobs, self.config, self.cluster, self.capacity = workload.jobs, config, cluster, capacity
        self.tokens = np.array([job.tokens for job in self.jobs], float)
        self.parameters = [adapter_parameters(config, job) for job in self.jobs]
        self.longest = max(sample.tokens for job in self.jobs for sample in (*job.samples, *job.evaluation))
        self.in_hand = [max(_tokens_of(job, batch) for batch in job.batches_of_an_epoch) for job in self.jobs]
        models = useful_depths(min(cluster.gpus, config.num_hidden_layers, MOST_STAGES), costs)
        labels = max(job.most_labels for job in self.jobs)
        self.depths = [
            Depth(self.jobs, PipelineMemory(config, model, cluster.memory, checkpointing, labels)) for model in models
        ]
        self._distributed: dict[int, list[list[int]] | None] = {}
        self._alone: dict[tuple[int, int], np.ndarray] = {}

    def choices(self) -> list[Choice]:
        """The fastest or the cheapest divisions, the best first: those that `lorafusion train` can run, whose groups
        are on one node, then the others, and what does not fit last. Raises `UserError` where none fits."""
        divisions, failed = [], []
        for depth in self.depths:
            fitting = [division for shape in self._shapes(depth) if (division := self._division(depth, *shape))]
            divisions += fitting
            if not fitting and places(self.cluster.gpus, depth.stages, self.cluster.per_node):
                failed.append(self._failed(depth))
        if not divisions:
            raise UserError(self._nothing_fits(failed))
        tried = self._in_order(self._tried(divisions))
        tried.sort(key=lambda division: division.size > self.cluster.per_node)
        return [*map(self._choice, tried), *failed]

    def _in_order(self, divisions: list[_Division]) -> list[_Division]:
        """Divisions that were simulated, the best first: the fastest one, or the cheapest, of those that cost about the
        same the fastest."""
        least = min(division.work for division in divisions)

        def place(division: _Division) -> tuple[int, float, int]:
            dearer = math.floor((division.work / least - 1) / CLOSE) if self.cheap else 0
            return dearer, division.makespan, division.stages

        return sorted(divisions, key=place)

    def timeline(self, choice: Choice, system: str) -> tuple[Plan, Timeline]:
        """A plan of the first global batches of a choice's slowest group, and its timeline."""
        members = choice.members[choice.slowest]
        model = self._costs(self._depth(choice.stages), choice.data_parallel, members)
        jobs = [self.jobs[job] for job in members]
        part = min(1.0, SHOWN_SAMPLES / sum(job.stream_length - job.first_position for job in jobs))
        steps = [job.start + math.ceil((len(job.batches) - job.start) * part) for job in jobs]
        first = [job.model_copy(update={"steps": count}) for job, count in zip(jobs, steps, strict=True)]
        workload = Workload(name="first", jobs=tuple(first))
        first_plan = plan(workload, system, choice.stages, choice.capacity, choice.data_parallel, costs=model)
        return first_plan, simulate(first_plan, costs_of(first_plan, workload, model))

    def _shapes(self, depth: Depth) -> set[tuple[int, int]]:
        """Numbers of groups and of replicas: for some sizes of a group as many groups as there is room for, and for
        some numbers of groups the largest size."""
        cluster, stages, jobs = self.cluster, depth.model.stages, len(self.jobs)
        shapes = set()
        for replicas in _sizes(cluster.gpus // stages):
            shapes.add((min(places(cluster.gpus, stages * replicas, cluster.per_node), jobs), replicas))
        for groups in _sizes(min(jobs, cluster.gpus // stages)):
            fitting = (
                replicas
                for replicas in range(cluster.gpus // (stages * groups), 0, -1)
                if places(cluster.gpus, stages * replicas, cluster.per_node) >= groups
            )
            largest = next(fitting, 0)
            shapes.add((groups, largest))
            if self.cheap:  # fewer GPUs than there are: a replica more makes no work less
                shapes.add((groups, min(largest, 1)))
        return {shape for shape in shapes if all(shape)}

    def _division(self, depth: Depth, at_once: int, replicas: int) -> _Division | None:
        """The division with the jobs in its groups, as many as fit at once if all jobs do; None where a job does not
        fit."""
        stages, room = depth.model.stages, depth.memory.parameters(self.longest)
        if max(self.parameters) > room:
            return None
        groups = max(at_once, -(-sum(self.parameters) // room))
        while (members := self._members(groups, room)) is None:
            groups += 1 + groups // WIDER
        at_once = min(at_once, groups)
        model = self._costs(depth, replicas, range(len(self.jobs)))
        steps = depth.steps * depth.busiest.layers[0] * (model.step + model.reduction)
        if (stages, replicas) not in self._alone:
            self._alone[stages, replicas] = depth.alone(replicas)
        group_of = np.empty(len(self.jobs), np.int64)
        for index, jobs in enumerate(members):
            group_of[jobs] = index
        passes, samples, stepping = (
            np.bincount(group_of, column, groups) for column in (depth.seconds, depth.batch_samples, steps)
        )
        estimates = passes / np.minimum(replicas, samples) + stepping
        np.maximum.at(estimates, group_of, self._alone[stages, replicas] + steps)
        order = np.argsort(-estimates, kind="stable")  # the longest begins first
        in_order = [members[group] for group in order]
        return _Division(len(members), at_once, stages, replicas, in_order, estimates[order])

    def _members(self, groups: int, room: float) -> list[list[int]] | None:
        """The jobs of each group, by time alone if they fit so."""
        seconds, unlimited = self.depths[0].seconds.tolist(), math.inf
        if groups not in self._distributed:
            self._distributed[groups] = distribute(seconds, self.parameters, groups, unlimited)
        members = self._distributed[groups]
        if members and max(sum(self.parameters[job] for job in jobs) for jobs in members) > room:
            return distribute(seconds, self.parameters, groups, room)
        return members

    def _costs(self, depth: Depth, replicas: int, jobs: Iterable[int]) -> CostModel:
        """The costs of a group with these jobs."""
        parameters = float(np.mean([self.parameters[job] for job in jobs]))
        return with_links(depth.model, self.config, self.cluster, replicas, parameters)

    def _tried(self, divisions: list[_Division]) -> list[_Division]:
        """The divisions that were simulated: of those whose groups are on one node, and of the others, the fastest by
        their estimates, all that may be faster, and a gang."""
        parts: dict[bool, list[_Division]] = {False: [], True: []}
        for division in divisions:
            parts[division.size > self.cluster.per_node].append(division)
        tried = []
        with progress() as bar:
            task = bar.add_task("simulating divisions", total=None)
            for spanning, part in parts.items():
                for division in self._promising(part, SHOWN_SPANNING if spanning else SHOWN):
                    tried.append(division)
                    bar.advance(task)
        return tried

    def _promising(self, divisions: list[_Division], shown: int) -> Iterator[_Division]:
        """The divisions that may be the best, simulated; so many at least."""
        if not divisions:
            return
        fewest, least = min(d.at_once for d in divisions), min(map(self._estimated, divisions))
        divisions = sorted(divisions, key=lambda division: self._turn(division, least))
        gang = next((division for division in divisions if division.at_once == fewest == 1), None)
        tried: list[_Division] = []
        for index, division in enumerate(divisions):
            is_shown = index < shown or division is gang
            if is_shown or (len(tried) < shown + MOST_FURTHER and self._may_be_better(division, tried[0])):
                self._simulate(division, 1)
                tried = self._in_order([*tried, division])
                yield division
        while len(tried[0].simulated) < min(SIMULATED_GROUPS, tried[0].groups):
            self._simulate(tried[0], SIMULATED_GROUPS)
            tried = self._in_order(tried)

    def _estimated(self, division: _Division) -> float:
        """At best, of what is preferred."""
        return division.estimated_work if self.cheap else division.estimate

    def _turn(self, division: _Division, least: float) -> tuple[float, ...]:
        """Divisions with about the same estimate are tried by their sizes, or where they are to be cheap by their time.
        least: of any division."""
        about = int((self._estimated(division) / least - 1) / CLOSE)
        return (about, division.estimate) if self.cheap else (about, division.size, division.stages)

    def _may_be_better(self, division: _Division, best: _Division) -> bool:
        """Than what was simulated, by its estimates."""
        is_faster = division.estimate < best.makespan * (1 - GAIN)
        if not self.cheap:
            return is_faster
        cost = division.estimated_work / best.work
        return cost < 1 - GAIN or (is_faster and cost < 1 + CLOSE)

    def _simulate(self, division: _Division, groups: int) -> None:
        """Simulate the groups that are estimated to take the longest, so many of them."""
        depth = self._depth(division.stages)
        for group in np.argsort(-division.estimates, kind="stable")[:groups].tolist():
            if group in division.simulated:
                continue
            members = division.members[group]
            jobs = tuple(self.jobs[job] for job in members[:: -(-len(members) // SIMULATED_ADAPTERS)])
            trials = Trials(jobs, division.stages, self._capacity(depth, members), division.data_parallel)
            prediction = trials.fastest(self._costs(depth, division.data_parallel, members))
            seconds = float(self.tokens[members].sum()) / prediction.throughput
            division.predictions[group] = prediction
            division.simulated[group] = max(seconds, float(division.estimates[group]))

    def _depth(self, stages: int) -> Depth:
        return next(depth for depth in self.depths if depth.stages == stages)

    def _capacity(self, depth: Depth, members: list[int]) -> int:
        """The most tokens of a microbatch of a group."""
        fitting = depth.memory.capacity(sum(self.parameters[job] for job in members))
        return max(self.longest, min(fitting, self.capacity or fitting))

    def _choice(self, division: _Division) -> Choice:
        depth = self._depth(division.stages)
        times, seconds = division.times, division.makespan
        target = max(prediction.way.target for prediction in division.predictions.values())
        largest = min(self._capacity(depth, jobs) for jobs in division.members)
        in_hand = max(sum(self.in_hand[job] for job in jobs) for jobs in division.members)
        capacity = max(self.longest, min(target, largest, in_hand))
        parameters = max(sum(self.parameters[job] for job in jobs) for jobs in division.members)
        return Choice(
            division.groups,
            division.at_once,
            division.stages,
            division.data_parallel,
            nodes_of(division.size, self.cluster.per_node),
            self.cluster.gpus - division.at_once * division.size,
            capacity,
            largest,
            throughput=float(self.tokens.sum()) / seconds,
            bubble=max(0.0, float(np.mean([prediction.bubble for prediction in division.predictions.values()]))),
            memory=depth.memory.most_used(parameters, capacity),
            makespan=seconds,
            gpu_hours=float(times.sum()) * division.size / 3600,
            members=tuple(map(tuple, division.members)),
            times=tuple(times.tolist()),
        )

    def _failed(self, depth: Depth) -> Choice:
        """The choice of a pipeline that holds no group, and why: with the largest adapter alone."""
        nodes = nodes_of(depth.stages, self.cluster.per_node)
        reason = depth.memory.reason(max(self.parameters), self.longest)
        return Choice(0, 0, depth.stages, 1, nodes, self.cluster.gpus, reason=reason)

    def _nothing_fits(self, failed: list[Choice]) -> str:
        """failed: by their stages. The most stages came closest."""
        choice = failed[-1]
        where = f"{choice.stages} stage{'s' * (choice.stages > 1)}: {choice.reason}"
        hint = "" if self.depths[0].memory.checkpointing else "; try checkpointing" * ("tokens" in choice.reason)
        return f"{self.cluster.gpus} GPUs of {self.cluster.memory / GIB:.0f} GiB: nothing fits; {where}{hint}"


def with_links(model: CostModel, config: ModelConfig, cluster: Cluster, replicas: int, parameters: float) -> CostModel:
    """A cost model with the times of a cluster's links for a group, whose adapters have so many parameters in a
    layer."""
    if model.stages > cluster.per_node:
        between = HIDDEN_BYTES * config.hidden_size / cluster.network
        model = model.model_copy(update={"transfer": max(model.transfer, between)})
    link = cluster.link if model.stages * replicas <= cluster.per_node else cluster.network
    return over_replicas(model, config, parameters, replicas, link)


def _tokens_of(job: Job, batch: range) -> int:
    return job.stream_offset(batch.stop) - job.stream_offset(batch.start)


def _sizes(most: int) -> Iterator[int]:
    """Some numbers from 1 to `most`."""
    size = 1
    while size < most:
        yield size
        size = max(size + 1, size * 7 // 6) if size >= ALL_SIZES else size + 1
    if most:
        yield most
