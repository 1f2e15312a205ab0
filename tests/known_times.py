"""Runs whose times are known: six systems train two workloads on the tiny model, and what they made is kept in files.

A forward pass takes what is written here, on a clock that nothing else moves.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import yaml
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.config import CONFIGS, read_model, read_system
from lorafusion.data.lengths import make_workload
from lorafusion.engine import task
from lorafusion.engine.process import WorkerProcess
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.experiment import Inputs
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table.table import read
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import Outcome
from lorafusion.planning import plan_system
from lorafusion.planning.simulator import CostModel, Question, costs_for
from tests.known_meter import KnownMeter

CAPACITY = {"xsum": 32, "wikisum": 80}
# Seconds of a token in the first repeat.
RATES = {
    "lorafusion": 0.010,
    "mlora": 0.009,  # padded
    "mlora-paper-setting": 0.014,
    "peft-bf16": 0.016,
    "unfused-sequential": 0.020,
    "unfused-ours": 0.013,
}
BASELINES = ("mlora", "mlora-paper-setting", "peft-bf16")
# What the machine does to all systems of a repeat, and what happens to one of them besides.
DRIFT = (1.0, 2.0, 1.25, 0.8, 1.6, 1.1)
OWN = {"lorafusion": (1.0, 1.02, 0.98, 1.01, 0.99, 1.03), "peft-bf16": (1.0, 1.0, 1.05, 0.97, 1.0, 1.0)}
NOTHING = (1.0,) * len(DRIFT)
REPEATS = range(1, len(DRIFT) + 1)
EACH = 20  # tokens that take as long as what a forward pass takes besides its own
MEMORY = 1000  # bytes of a token
FAILED = ("mlora", "wikisum", 3)


class PacedMeter(KnownMeter):
    def passed(self, tokens: int) -> None:
        super().passed(tokens)
        self.now += EACH * self.of_a_token


class Run:
    """What is known of a cell's runs, by hand."""

    def __init__(self, system: str, workload: str, plan: dict) -> None:
        self.system, self.workload = system, workload
        # (tokens, tokens with padding) of each microbatch.
        self.sizes = []
        for microbatch in plan["microbatches"]:
            tokens = sum(segment["tokens"] for segment in microbatch["segments"])
            samples = sum(len(segment["samples"]) for segment in microbatch["segments"])
            self.sizes.append((tokens, samples * microbatch["row_tokens"] if "row_tokens" in microbatch else tokens))

    @cached_property
    def tokens(self) -> int:
        return sum(tokens for tokens, _ in self.sizes)

    def seconds(self, repeat: int, first: int = 0) -> float:
        """Of the microbatches from the `first` on."""
        rate = RATES[self.system] * DRIFT[repeat - 1] * OWN.get(self.system, NOTHING)[repeat - 1]
        return rate * sum(length + EACH for _, length in self.sizes[first:])

    def throughput(self, repeat: int, window: str = "whole") -> float:
        """Tokens/s. One stage's steady window begins after the first three microbatches."""
        first = {"whole": 0, "steady": 3}[window]
        return sum(tokens for tokens, _ in self.sizes[first:]) / self.seconds(repeat, first)

    def throughputs(self, window: str) -> list[float]:
        return [self.throughput(repeat, window) for repeat in REPEATS]


def costs_on_cpu(system: str) -> CostModel:
    """By which a suite's cells on one process are planned."""
    return costs_for(Question(1, read_model("tiny"), device="cpu", implementation=read_system(system).implementation))


class Story:
    """All runs, the folder with their results, and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.results = folder, {}, []
        grid = {"models": ["tiny"], "gpus": [1], "workloads": list(CAPACITY), "systems": list(RATES), "samples": 6,
                "global_batch": 2, "length_scale": 64, "capacity": CAPACITY, "minutes": 3}  # fmt: skip
        suite = {"name": "known", "description": "times that are known", "device": "cpu", "dtype": "float32",
                 "adapter_dtype": "float32", "repeats": len(DRIFT), "cost": False,
                 "cells": [grid]}  # fmt: skip
        self.suite = folder / "known.yaml"
        self.suite.write_text(yaml.safe_dump(suite))
        for workload in CAPACITY:
            made = make_workload(
                CONFIGS / "workloads" / f"{workload}.yaml", samples=6, global_batch=2, scale=64, seed=1
            )
            path = folder / f"{workload}.json"
            path.write_text(made.to_json())
            for system in RATES:
                plan = folder / f"{workload}-{system}.json"
                capacity = CAPACITY[workload]
                plan.write_text(
                    plan_system(made, system, stages=1, capacity=capacity, costs=costs_on_cpu(system)).to_json()
                )
                self.runs[system, workload] = run = Run(system, workload, json.loads(plan.read_text()))
                assert len(run.sizes) >= 5
                self._train(run, path, plan)
        table = folder / "measurements.csv"
        command = [
            "lab",
            "measure",
            "smoke",
            "end_to_end",
            *map(str, self.results),
            "--out",
            str(folder),
            "--any-suite",
        ]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        # By `lorafusion lab figure` they would need the suite's checks too.
        FIGURES["end_to_end"].draw(read(table), folder / "end_to_end", "tiny")
        FIGURES["validation"].draw(read(table), folder / "validation")
        FIGURES["contributions"].draw(read(table), folder / "contributions", "tiny")
        self.table = pd.read_csv(table)

    def _train(self, run: Run, workload: Path, plan: Path) -> None:
        """One real run, by a clock on which a token takes a second; each repeat took so many times as long."""
        reports: list[dict] = []

        def train(spec, processes, *_) -> Outcome:
            repeat = len(self.results) % len(DRIFT) + 1
            if (run.system, run.workload, repeat) == FAILED:
                return Outcome("oom", "rank 0: too large")
            if not reports:
                meter = PacedMeter(seconds=1.0, memory=MEMORY)
                with meter.watching():
                    position = Position(self.folder, 0)
                    reports.append(
                        task.train(WorkerProcess(spec, torch.device("cpu"), position, world=processes, meter=meter))
                    )
            factor = run.seconds(repeat) / sum(length + EACH for _, length in run.sizes)
            times = {"seconds": [[slot, factor * time] for slot, time in reports[0]["seconds"]],
                     "clocks": [[factor * time for time in clocks] for clocks in reports[0]["clocks"]]}  # fmt: skip
            return Outcome("ok", report=json.loads(json.dumps(reports[0] | times)))

        cell = f"model~tiny/workload~{run.workload}/gpus~1/batch~2/system~{run.system}"
        for repeat in REPEATS:
            out = self.folder / f"{run.system}-{run.workload}-{repeat}.result.json"
            point = EXPERIMENTS["end_to_end"].point(str(self.suite), cell)
            EXPERIMENTS["end_to_end"].run(point, repeat, out, None, Inputs(workload, plan, launch=train))
            self.results.append(out)

    def values(self, metric: str, window: str, statistic: str, kind: str = "measured") -> dict[tuple, float]:
        """By system, workload and, of single runs, repeat."""
        rows = self.table[(self.table["metric"] == metric) & (self.table["window"] == window)]
        rows = rows[(rows["statistic"] == statistic) & ~rows["implementation"].str.startswith("canary")]
        rows = rows[rows["kind"] == kind]
        keys = ["system", "workload"] + (["repeat"] if statistic == "single" else [])
        return rows.set_index(keys)["value"].dropna().to_dict()

    def finished(self) -> dict[tuple[str, str], Run]:
        return {key: run for key, run in self.runs.items() if key != FAILED[:2]}
