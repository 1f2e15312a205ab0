"""The words of the measurement table: its columns, its metrics with their units, and the closed sets of values."""

from typing import Any, NamedTuple


class Metric(NamedTuple):
    """What a number is in, and which way is better."""

    unit: str
    direction: str
    meaning: str


METRICS = {
    "time": Metric("s", "lower", "duration of the window"),
    "throughput": Metric("tok/s", "higher", "tokens trained per second, padding not counted"),
    "throughput_padded": Metric("tok/s", "higher", "tokens per second, padding counted"),
    "frozen_throughput": Metric("tok/s", "higher", "of the model without adapters, in the same process"),
    "tflops": Metric("TFLOP/s", "higher", "useful floating-point operations per second"),
    "peak_memory": Metric("B", "lower", "largest memory of a process"),
    "saved_memory": Metric("B", "lower", "activations kept for the backward pass"),
    "dram_traffic": Metric("B", "lower", "bytes read from and written to the GPU's memory"),
    "overhead": Metric("1", "lower", "time over that of the frozen linear or model, less one"),
    "speedup": Metric("1", "higher", "a ratio of times or throughputs, above one is faster"),
    "bubble": Metric("1", "lower", "idle share of a stage by its schedule"),
    "host_idle": Metric("1", "lower", "share of a run in which a stage waits for its host to launch work"),
    "neighbour_idle": Metric("1", "lower", "share in which it waits for others although the schedule has work"),
    "busy": Metric("1", "higher", "share of the time in which the device computes or copies"),
    "kernels": Metric("1/ktok", "lower", "kernels and copies of the device for 1000 tokens, all processes together"),
    "launches": Metric("1/ktok", "lower", "launches by which the host started them, for 1000 tokens"),
    "device_busy": Metric("ms/ktok", "lower", "time in which devices compute or copy for 1000 tokens, all together"),
    "operators": Metric("1/ktok", "lower", "operators of PyTorch for 1000 tokens, where the device is the CPU"),
    "fill": Metric("1", "higher", "tokens over capacity, mean over the microbatches"),
    "microbatch_ratio": Metric("1", "lower", "microbatches over their lower bound"),
    "solve_time": Metric("s", "lower", "time that the planner took"),
    "host_time": Metric("s", "lower", "time until the host has launched a pass, with a device that waits for it"),
    "host": Metric("s", "lower", "of a forward and backward pass as a user runs it, until the call returns"),
    "wall": Metric("s", "lower", "of such a pass, of many one after another"),
    "device": Metric("s", "lower", "of such a pass as a CUDA graph, of many one after another"),
    "step_time": Metric("s", "lower", "optimizer steps of all adapters of a microbatch"),
    "transfer_time": Metric("s", "lower", "a message from one device to another"),
    "cores": Metric("1", "higher", "cores that the processes of a CPU share"),
    "error": Metric("1", "lower", "relative error against a reference"),
}
# What a run costs besides time, and where its time went: a good run may lack it.
COSTS = ("kernels", "launches", "device_busy", "busy", "operators", "bubble", "host_idle", "neighbour_idle",
         "frozen_throughput")  # fmt: skip
KINDS = ("measured", "simulated", "published", "derived")
# From bad to worse: where the repeats of a cell fail in different ways, its summary has the worst.
STATUSES = ("ok", "skipped", "timeout", "oom", "crash", "nan")
WINDOWS = ("whole", "steady")
STATISTICS = ("single", "median")


class Column(NamedTuple):
    """A column's pandas type and meaning, whether every row has it, and its closed set of values if there is one."""

    dtype: str
    meaning: str
    required: bool = False
    values: tuple[str, ...] | None = None


COLUMNS = {
    "suite": Column("string", "file of configs/suites that asked for the row", True),
    "kind": Column("string", "where the number comes from", True, KINDS),
    "cell": Column("string", "identity of the point of the suite's grid", True),
    "system": Column("string", "entry of configs/systems.yaml"),
    "model": Column("string", "file of configs/models"),
    "workload": Column("string", "file of configs/workloads"),
    "gpus": Column("Int64", "GPUs, or processes where the device is the CPU"),
    "repeat": Column("Int64", "which fresh process; empty for a summary"),
    "metric": Column("string", "what the number is", True, tuple(METRICS)),
    "value": Column("Float64", "the number; empty unless status is ok"),
    "unit": Column("string", "fixed by the metric", True),
    "direction": Column("string", "which way is better, fixed by the metric", True, ("lower", "higher")),
    "statistic": Column("string", "one run's number, or the median over repeats", True, STATISTICS),
    "n": Column("Int64", "fresh processes behind the row, failed ones included", True),
    "ci_low": Column("Float64", "lower end of the 95 % interval of the median, where enough repeats allow one"),
    "ci_high": Column("Float64", "upper end of that interval"),
    "window": Column("string", "first forward to last step, or without fill and drain", True, WINDOWS),
    "status": Column("string", "how the run ended", True, STATUSES),
    "note": Column("string", "what a reader must know besides"),
    "implementation": Column("string", "LoRA implementation, or the name of a canary"),
    "pass": Column("string", "passes of a layer that were timed", False, ("forward", "backward", "both")),
    "tokens": Column("Int64", "rows of a layer's input"),
    "in_features": Column("Int64", "columns of a layer's input"),
    "out_features": Column("Int64", "columns of a layer's output"),
    "rank": Column("Int64", "LoRA rank; empty where adapters differ"),
    "adapters": Column("Int64", "adapters trained"),
    "dropout": Column("Float64", "LoRA dropout; empty where adapters differ"),
    "dtype": Column("string", "of the base model"),
    "stages": Column("Int64", "pipeline stages"),
    "global_batch": Column("Int64", "samples of one optimizer step"),
    "capacity": Column("Int64", "tokens a microbatch may hold"),
    "merged_qkv": Column("boolean", "have q, k and v one adapter, as one linear? empty where there is no such choice"),
    "samples": Column("Int64", "samples an adapter"),
    "bench": Column("string", "bench of the suite's entry in configs/steps.yaml"),
    "git_sha": Column("string", "commit of this project"),
    "git_dirty": Column("boolean", "were there changes that are not in the commit?"),
    "tree_hash": Column("string", "of the project's source files, the same with and without a repository"),
    "config_hash": Column("string", "of the cell's settings"),
    "workload_hash": Column("string", "of the jobs and their samples"),
    "plan_hash": Column("string", "of the plan that was run"),
    "gpu_name": Column("string", "empty for a run on the CPU"),
    "gpu_uuid": Column("string", "identity of the GPU"),
    "driver": Column("string", "version of the GPU's driver"),
    "cuda": Column("string", "version that torch was built with"),
    "torch": Column("string", "version"),
    "triton": Column("string", "version"),
    "clock_mhz": Column("Float64", "SM clock at the start, MHz"),
    "power_w": Column("Float64", "power draw at the start, W"),
    "seed": Column("Int64", "of the run"),
    "started_at": Column("string", "UTC, ISO 8601"),
    "command": Column("string", "what to type to run it again"),
    "result": Column("string", "path of the run's result file"),
    "log": Column("string", "path of the run's log"),
}
# What tells a cell from another, but for its name. The capacity does not: where it is tuned it is a result.
IDENTITY = (
    *("suite", "kind", "system", "model", "workload", "gpus", "tokens", "in_features", "out_features", "rank"),
    *("adapters", "dropout", "dtype", "stages", "global_batch", "merged_qkv", "samples", "bench"),
)
TYPE_NAMES = {"string": "text", "Int64": "a whole number", "Float64": "a number", "boolean": "True or False"}
JSON_TYPES = {"string": "string", "Int64": "integer", "Float64": "number", "boolean": "boolean"}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a row, an empty field being null."""
    fixed = [
        {
            "if": {"properties": {"metric": {"const": name}}},
            "then": {"properties": {"unit": {"const": metric.unit}, "direction": {"const": metric.direction}}},
        }
        for name, metric in METRICS.items()
    ]
    value = {
        "if": {"properties": {"status": {"const": "ok"}}},
        "then": {"properties": {"value": {"type": "number"}}},
        "else": {"properties": {"value": {"type": "null"}}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A row of the measurement table",
        "description": "\n".join(f"{name} ({metric.unit}): {metric.meaning}" for name, metric in METRICS.items()),
        "type": "object",
        "properties": {name: _property(column) for name, column in COLUMNS.items()},
        "required": list(COLUMNS),
        "additionalProperties": False,
        "allOf": [*fixed, value],
    }


def _property(column: Column) -> dict[str, Any]:
    empty: list[Any] = [] if column.required else [None]
    if column.values:
        return {"description": column.meaning, "enum": [*column.values, *empty]}
    return {"description": column.meaning, "type": [JSON_TYPES[column.dtype], *("null" for _ in empty)]}
