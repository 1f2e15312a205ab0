"""Hostile files: each place of a command's line where a file is read, with each mutation of a file of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tests.torture import spoiled, valid
from tests.torture.case import Case
from tests.torture.spoiled import Mutations

# Mutations that all commands which read the same kind of file by the same code are tried with.
FEW = ("missing", "a-folder", "a-pipe", "empty", "binary", "utf-16", "cut", "a-list", "unknown-key", "deep-lists")
SUITES = {
    "lab list": (), "lab run": (), "lab run --here": (), "lab measure": (), "lab figure": (), "lab check": (),
    "lab profile-costs": (), "lab report": (), "lab publish": (), "lab preflight": (), "reproduce": (),
}  # fmt: skip
# A training that has looked at its jobs file and its model owns its output, and says there what became of it.
OWNED = ("out", "out/.lock", "out/model.yaml", "out/progress.json", "out/status.json")
TABLE = "lab figure smoke planner_bubble"
Files = Callable[[Any], Mapping[str, Any]]
# Damages of a base model on which nothing that `patch` says depends.
UNREAD = ("architecture", "quantization", "torch_dtype", "key-heads-that-do-not-divide", "no-words")


def placed(prefix: str, command: str, words: str, mutations: Mutations, files: Files, **options: Any) -> Iterator[Case]:
    """A case for each mutation; words: of the line, after the command; files: the files that lie there with it."""
    for name, content in mutations.items():
        yield Case(f"{prefix}/{name}", command, tuple(words.split()), files(content), **options)


def few(mutations: Mutations) -> Mutations:
    return {name: content for name, content in mutations.items() if name in FEW}


def all_cases() -> Iterator[Case]:
    for part in (_jobs, _configurations, _suites, _plans, _tables, _results, _data, _models, _adapters):
        yield from part()


def _jobs() -> Iterator[Case]:
    mutations = spoiled.no_file() | spoiled.yaml_text(valid.JOBS)

    def files(content: Any) -> dict:
        return valid.jobs_folder() | {"jobs.yaml": content}

    yield from placed("train/jobs", "train", "jobs.yaml", mutations, files, says=("jobs.yaml",), light=True)
    yield from placed("plan/jobs", "plan make", "jobs.yaml -o out.json", few(mutations), files, says=("jobs.yaml",),
                      light=True)  # fmt: skip


def _configurations() -> Iterator[Case]:
    mutations = spoiled.no_file() | spoiled.yaml_text(valid.config("workloads/xsum.yaml"))
    yield from placed("workload/config", "workload", "mine.yaml -o out.json", mutations,
                      lambda content: {"mine.yaml": content}, light=True)  # fmt: skip
    mutations = spoiled.no_file() | spoiled.yaml_text(valid.COSTS)
    plan = {"plan.json": valid.text(valid.plan()), "workload.json": valid.workload().to_json().encode()}
    yield from placed("show/costs", "plan show", "plan.json --costs costs.yaml", mutations,
                      lambda content: plan | {"costs.yaml": content}, light=True)  # fmt: skip
    yield from placed("plan/costs", "plan make", "workload.json --stages 2 -o out.json --costs costs.yaml",
                      few(mutations), lambda content: plan | {"costs.yaml": content}, light=True)  # fmt: skip
    yield from placed("propose/costs", "plan propose", "workload.json --model tiny --gpus 2 --costs costs.yaml",
                      few(mutations), lambda content: plan | {"costs.yaml": content}, light=True)  # fmt: skip
    mutations = spoiled.no_file() | spoiled.yaml_text(valid.PROFILE)
    yield from placed("show/profile", "plan show",
                      "plan.json --workload workload.json --model tiny --costs profile.yaml", mutations,
                      lambda content: plan | {"profile.yaml": content}, light=True)  # fmt: skip
    yield from placed("propose/profile", "plan propose", "workload.json --model tiny --gpus 2 --costs profile.yaml",
                      few(mutations), lambda content: plan | {"profile.yaml": content}, light=True)  # fmt: skip
    mutations = spoiled.no_file() | spoiled.yaml_text(valid.config("models/tiny.yaml"))
    jobs = valid.JOBS.replace(b"model: tiny", b"model: model.yaml")
    yield from placed("train/model-file", "train", "jobs.yaml", few(mutations) | {"nan": b"hidden_size: .nan\n"},
                      lambda content: valid.jobs_folder(jobs) | {"model.yaml": content}, light=True)  # fmt: skip


def _suites() -> Iterator[Case]:
    mutations = spoiled.no_file() | spoiled.yaml_text(valid.SUITE)
    for line in SUITES:
        command = line.partition(" --")[0]
        words = f"{line[len(command) :]} suite.yaml".strip()
        chosen = mutations if line == "lab list" else few(mutations)
        yield from placed(f"{line.replace(' ', '-')}/suite", command, words, chosen,
                          lambda content: {"suite.yaml": content}, light=True)  # fmt: skip


def _plans() -> Iterator[Case]:
    workload = valid.workload().to_json().encode()
    mutations = spoiled.no_file() | spoiled.json_text(workload)
    plan = {"plan.json": valid.text(valid.plan())}

    def workload_files(content: Any) -> dict:
        return plan | {"workload.json": content}

    yield from placed("plan/workload", "plan make", "workload.json -o out.json", mutations, workload_files, light=True)
    yield from placed("show/workload", "plan show", "plan.json --workload workload.json", few(mutations),
                      workload_files, light=True)  # fmt: skip
    yield from placed("propose/workload", "plan propose", "workload.json --model tiny --gpus 2", few(mutations),
                      workload_files, light=True)  # fmt: skip
    mutations = spoiled.no_file() | spoiled.json_text(plan["plan.json"])
    mutations |= spoiled.json_values(valid.plan(), skipped=("system", "statistics", "key", "flush", "workload_hash"))
    same = ("without-data_parallel",)  # it has a default
    yield from placed("show/plan", "plan show", "plan.json", {k: v for k, v in mutations.items() if k not in same},
                      lambda content: {"plan.json": content}, light=True)  # fmt: skip
    mutations = spoiled.buckets(valid.plan_with_graphs())
    yield from placed("show/buckets", "plan show", "plan.json --workload workload.json", mutations,
                      lambda content: {"plan.json": content, "workload.json": workload}, says=("plan.json",),
                      light=True)  # fmt: skip
    mutations = few(spoiled.no_file() | spoiled.json_text(b'{"lorafusion": {}}')) | {"a-number": b"1", "text": b"x"}
    mutations.pop("unknown-key")  # which may be the name of a system
    yield from placed("contract/record", "lab contract", "record.json", mutations,
                      lambda content: {"record.json": content}, light=True)  # fmt: skip


def _tables() -> Iterator[Case]:
    csv, parquet = valid.csv(), valid.parquet()
    nothing = spoiled.no_file()
    yield from placed("figure/table", "lab figure", f"{TABLE[11:]} t.csv --out f", nothing | spoiled.csv_text(csv),
                      lambda content: valid.sealed_files("t.csv", content), light=True)  # fmt: skip
    yield from placed("figure/parquet", "lab figure", f"{TABLE[11:]} t.parquet --out f",
                      nothing | spoiled.binary(parquet),
                      lambda content: valid.sealed_files("t.parquet", content), light=True)  # fmt: skip
    seals = few(nothing) | spoiled.any_text(valid.seal("t.csv", csv))
    yield from placed("figure/seal", "lab figure", f"{TABLE[11:]} t.csv --out f", seals,
                      lambda content: {"t.csv": csv, "t.csv.sha256": content}, light=True)  # fmt: skip
    yield from placed("figure/curves", "lab figure", "smoke lossless c.csv --out f",
                      nothing | spoiled.csv_text(valid.CURVES),
                      lambda content: valid.sealed_files("c.csv", content), light=True)  # fmt: skip
    yield from placed("figure/profile", "lab figure", "smoke steps_profile p.csv --out f",
                      nothing | spoiled.csv_text(valid.PROFILE),
                      lambda content: valid.sealed_files("p.csv", content), light=True)  # fmt: skip
    yield from placed("publish/table", "lab publish", "smoke t.csv --out d", nothing | spoiled.csv_text(csv),
                      lambda content: valid.sealed_files("t.csv", content), light=True)  # fmt: skip
    yield from placed("publish/parquet", "lab publish", "smoke t.parquet --out d", spoiled.binary(parquet),
                      lambda content: valid.sealed_files("t.parquet", content), light=True)  # fmt: skip


def _results() -> Iterator[Case]:
    result = valid.text(valid.result())
    mutations = spoiled.no_file() | spoiled.json_text(result)
    values = {
        name: valid.resealed(valid.json_of(content))
        for name, content in spoiled.json_values(valid.result(), skipped=("seal", "note", "losses")).items()
        if name != "version-true"  # which is 1 to Python
    }
    line = "smoke end_to_end r.json --any-suite --incomplete --out d"
    yield from placed("measure/result", "lab measure", line, mutations | values, lambda content: {"r.json": content},
                      light=True)  # fmt: skip
    yield from placed("publish/result", "lab publish", "smoke t.csv r.json --out d", few(mutations),
                      lambda content: valid.sealed_files("t.csv", valid.csv()) | {"r.json": content},
                      light=True)  # fmt: skip
    yield from placed("figure/tuning", "lab figure", "smoke tunings r.json --model tiny --out f", few(mutations),
                      lambda content: {"r.json": content}, light=True)  # fmt: skip
    store = spoiled.no_file() | spoiled.binary(valid.store()) | spoiled.stores()
    yield from placed("measure/store", "lab measure", line.replace("r.json", "r.results.jsonl.gz"), store,
                      lambda content: {"r.results.jsonl.gz": content}, light=True)  # fmt: skip


def _data() -> Iterator[Case]:
    rows = spoiled.no_file() | spoiled.any_text(valid.ROWS) | spoiled.rows(valid.ROWS)
    yield from placed("train/rows", "train", "jobs.yaml", rows, lambda content: valid.jobs_folder(rows=content),
                      libraries=True, owns=OWNED)  # fmt: skip
    text = valid.JOBS.replace(b'{jsonl: rows.jsonl, prompt: "{q}", completion: " {a}"}', b"{text: rows.jsonl}")
    plain = spoiled.any_text(valid.ROWS)
    plain = {name: content for name, content in plain.items() if name in (
        "empty", "blank", "nul", "binary", "gzip", "utf-16", "utf-32", "latin-1", "surrogate-bytes")}  # fmt: skip
    plain.pop("nul")  # it is text
    yield from placed("train/text", "train", "jobs.yaml", spoiled.no_file() | plain,
                      lambda content: valid.jobs_folder(text, content), libraries=True, owns=OWNED)  # fmt: skip
    tokenizer = few(spoiled.no_file() | spoiled.json_text(valid.tokenizer()["tokenizer.json"]))
    tokenizer.pop("unknown-key")
    settings = valid.json_of(valid.tokenizer()["tokenizer_config.json"])
    tokenizer |= spoiled.tokenizer_values(valid.json_of(valid.tokenizer()["tokenizer.json"]))
    for name, mutations in {"tokenizer": tokenizer, "tokenizer_config": spoiled.tokenizer_settings(settings)}.items():
        yield from placed(f"train/{name}", "train", "jobs.yaml", mutations,
                          lambda content, name=name: valid.jobs_folder() | {f"tokenizer/{name}.json": content},
                          libraries=True, owns=OWNED)  # fmt: skip


def _models() -> Iterator[Case]:
    jobs = valid.JOBS.replace(b"model: tiny\ntokenizer: tokenizer", b"model: model")
    files = valid.jobs_folder(jobs) | valid.model()
    config = spoiled.no_file() | spoiled.json_text(valid.text(valid.MODEL)) | spoiled.model_values(valid.MODEL)
    for name in ("unknown-key", "a-key-twice", "nan", "infinity", "1e999", "a-long-key", "terminal-codes",
                 "a-surrogate-key", "a-lone-surrogate", "deep-lists", "deep-objects"):  # fmt: skip
        config.pop(name)  # what transformers reads, or says itself
    yield from placed("train/model", "train", "jobs.yaml", config,
                      lambda content: files | {"model/config.json": content}, libraries=True)  # fmt: skip
    yield from placed("train/weights", "train", "jobs.yaml", spoiled.no_file() | spoiled.safetensors(valid.weights()),
                      lambda content: files | {"model/model.safetensors": content}, libraries=True)  # fmt: skip
    index = {"weight_map": dict.fromkeys(valid.tensors(), "model.safetensors"), "metadata": {}}
    mutations = few(spoiled.json_text(valid.text(index))) | spoiled.indexes(index)
    mutations.pop("unknown-key")
    yield from placed("train/index", "train", "jobs.yaml", mutations,
                      lambda content: files | {"model/model.safetensors.index.json": content},
                      libraries=True)  # fmt: skip


def _adapters() -> Iterator[Case]:
    adapter = valid.text(valid.ADAPTER)
    mutations = spoiled.no_file() | spoiled.json_text(adapter) | spoiled.adapter_values(valid.ADAPTER)
    for name in ("unknown-key", "a-key-twice", "nan", "infinity", "1e999", "a-long-key", "terminal-codes",
                 "a-lone-surrogate", "a-surrogate-key", "a-long-integer"):  # fmt: skip
        mutations.pop(name)  # what PEFT reads
    for case in placed("patch/adapter", "patch", "adapter", mutations,
                       lambda content: valid.model() | {"adapter/adapter_config.json": content},
                       libraries=True):  # fmt: skip
        yield case if case.name != "patch/adapter/missing" else replace(case, files=valid.model())
    config = few(spoiled.no_file() | spoiled.json_text(valid.text(valid.MODEL))) | spoiled.model_values(valid.MODEL)
    for name in ("unknown-key", "deep-lists"):
        config.pop(name)
    for name in [name for name in config if name.startswith(UNREAD)]:
        config.pop(name)
    yield from placed("patch/base", "patch", "adapter", config,
                      lambda content: valid.model() | {"adapter/adapter_config.json": adapter,
                                                       "model/config.json": content}, libraries=True)  # fmt: skip
