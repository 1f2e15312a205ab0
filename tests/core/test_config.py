"""Configuration files: the committed ones are sound, and a mistake is one line with file and key."""

from __future__ import annotations

from itertools import product

import pytest
import yaml

from lorafusion.core.config import CONFIGS, names_in, no_graphs, read_model, read_system, read_systems
from lorafusion.core.plugins import load
from lorafusion.core.schema import UserError
from lorafusion.data.lengths import make_workload
from lorafusion.data.tokens import SyntheticTokens
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.keys import configuration_hash
from lorafusion.lab.suite import cells, read_suite, suite_path

SMOKE = CONFIGS / "suites" / "smoke.yaml"


@pytest.mark.parametrize("name", sorted(names_in("suites")))
def test_every_suite_is_sound(name):
    suite = read_suite(CONFIGS / "suites" / f"{name}.yaml")
    assert suite.name == name
    names = [cell.name for cell in cells(suite)]
    assert len(set(names)) == len(names)


def test_the_suite_of_two_gpus_has_twelve_global_batches_and_stages_beside_replicas():
    suite = read_suite(suite_path("h200x2"))
    found = cells(suite)
    assert min(cell.grid.samples // cell.grid.global_batch for cell in found) >= 12
    scaled = [cell for cell in found if cell.name.startswith("model~llama-3.1-8b/workload~mixed/")]
    ours = {cell.workload_name.partition("/gpus~")[2]: (cell.stages, cell.grid.data_parallel)
            for cell in scaled if cell.system == "lorafusion"}  # fmt: skip
    assert ours == {"1/batch~8": (1, 1), "2/batch~8": (2, 1), "2/batch~8/replicas~2": (1, 2)}
    often = {(cell.system, cell.workload) for cell in found if suite.repeats_of(cell.grid) == 3}
    arms = ("lorafusion", "mlora-paper-setting", "megatron-pp")
    assert often == {(arm, workload) for arm in arms for workload in ("mixed", "heterogeneous")}
    sharded = {cell.workload_name for cell in found if cell.system == "megatron-fsdp" and cell.gpus == 2}
    assert not any("replicas" in name for name in sharded)


@pytest.mark.parametrize("name", sorted(names_in("models")))
def test_every_model_is_sound(name):
    assert read_model(name).hidden_size % read_model(name).num_attention_heads == 0


@pytest.mark.parametrize(
    ("rope", "asks"), [("default", False), ("llama3", False), ("dynamic", True), ("longrope", True)]
)
def test_stages_whose_rotation_asks_the_device_have_no_graphs(rope, asks):
    model = read_model("tiny").model_copy(update={"rope_parameters": {"rope_type": rope}})
    reason = no_graphs("lorafusion", read_system("lorafusion"), "cuda", model)
    expected = f"the host asks the device for the longest position of a rotary embedding of type {rope}"
    assert reason == (expected if asks else "")


@pytest.mark.parametrize("name", [name for name, system in read_systems().items() if not unavailable(system)])
def test_every_system_has_its_parts(name):
    system = read_systems()[name]
    for role, path in (("planner", system.planner), ("executor", system.executor), ("LoRA kind", system.lora)):
        assert callable(load(path, role))


def test_the_smoke_suite_has_the_cells_that_it_should():
    found = {(cell.system, cell.workload, cell.gpus, cell.grid.merged_qkv) for cell in cells(read_suite(SMOKE))}
    workloads = ("xsum", "heterogeneous")
    many = {(s, w, g, False) for s in ("lorafusion", "mlora", "megatron-pp") for w in workloads for g in (1, 2)}
    parts = ("peft-bf16", "mlora-paper-setting", "unfused-sequential", "unfused-ours")
    one = {(s, w, 1, False) for s in parts for w in workloads}
    four = {("lorafusion", "heterogeneous", 4, False), ("mlora", "heterogeneous", 4, False)}
    sharded = {("megatron-fsdp", "heterogeneous", 2, False)}
    merged = {(s, "heterogeneous", 1, True) for s in ("lorafusion", "unfused-ours")}
    assert found == many | one | four | sharded | merged


def test_the_h200_suite_has_all_systems_and_the_ablations_merged_too():
    every = cells(read_suite(suite_path("h200")))
    separate = {(cell.system, cell.workload) for cell in every if not cell.grid.merged_qkv}
    merged = {(cell.system, cell.workload) for cell in every if cell.grid.merged_qkv}
    workloads = {"xsum", "cnn_dailymail", "wikisum", "mixed", "heterogeneous"}
    optional = {"grouped-mm", "peft-transformers", "peft-liger", "unsloth"}
    compared = set(read_systems()) - optional - {"lorafusion-eager"}  # which this suite's lorafusion is, too
    assert separate == set(product(compared, workloads)) | {(name, "mixed") for name in optional}
    corners = {"unfused-sequential", "mlora-packed", "unfused-ours", "fused-sequential", "fused-mlora", "lorafusion"}
    assert merged == set(product(corners, workloads))


def test_prompts_are_compared_with_none_in_every_system_but_the_ablations():
    """On samples of the same lengths, of which a tenth of the tokens is learnt."""
    every = {(cell.system, cell.workload) for cell in cells(read_suite(suite_path("h200-prompts")))}
    systems = {name for name, system in read_systems().items() if not system.ablation} - {"unsloth"}
    assert every == set(product(systems, ("mixed", "prompt-90")))
    mixed, prompts = (
        make_workload(CONFIGS / "workloads" / f"{name}.yaml", samples=40, global_batch=8)
        for name in ("mixed", "prompt-90")
    )
    assert [job.model_copy(update={"prompt": 0.0}) for job in prompts.jobs] == list(mixed.jobs)
    assert "prompt" not in mixed.to_json()
    source = SyntheticTokens(100)
    for job in prompts.jobs:
        learnt = [source.labels(job, sample) for sample in job.samples]
        assert learnt == [len(ids) - first for ids, first in (source.tokens(job, sample) for sample in job.samples)]
        assert sum(learnt) / job.tokens == pytest.approx(0.1, abs=0.01)


def test_the_papers_suite_has_the_papers_grid():
    found = {
        (cell.system, cell.model, cell.workload, cell.gpus) for cell in cells(read_suite(suite_path("paper-grid")))
    }
    assert ("lorafusion", "llama-3.1-8b", "heterogeneous", 1) in found
    assert ("megatron-fsdp", "qwen2.5-32b", "xsum", 2) in found
    assert ("mlora", "llama-3.1-70b", "wikisum", 4) in found
    assert ("megatron-pp", "llama-3.1-70b", "mixed", 16) in found


CHANGES = {
    "an unknown system": ({"systems": ["loras"]}, "cells.0: unknown system 'loras'; known: fused-mlora"),
    "an unknown model": ({"models": ["gpt"]}, "cells.0: unknown model 'gpt'; known: llama-3.1-70b"),
    "an unknown workload": ({"workloads": ["c4"]}, "cells.0: unknown workload 'c4'; known: cnn_dailymail"),
    "more stages than layers": ({"gpus": [5]}, "cells.0: 5 stages, but model tiny has only 4 layers"),
    "graphs on a CPU": (
        {"graphs": "on"},
        "cells.0.graphs: found on, expected auto or off: the device is cpu, and graphs need a GPU",
    ),
    "cuDNN on a CPU": (
        {"attention": "cudnn"},
        "cells.0.attention: found cudnn, expected auto or flash: the device is cpu, and cuDNN needs a GPU",
    ),
    "no gpus": ({"gpus": [0]}, "cells.0.gpus.0: input should be greater than or equal to 1 (found 0)"),
    "replicas that do not divide": ({"data_parallel": 3, "gpus": [4]}, "4 gpus cannot hold 3 replicas of equal size"),
    "a negative batch": ({"global_batch": -1}, "cells.0.global_batch: input should be greater than or equal to 1"),
    "capacity of a missing workload": ({"capacity": {"xsum": 9}}, "must name exactly the workloads of its block"),
    "capacity 0": ({"capacity": 0}, "capacity must be from 1 to 2147483647 tokens"),
    "a misspelt key": ({"sample": 3}, "cells.0.sample: unknown key (found 3)"),
    "a system on too many gpus": ({"systems": ["peft"], "gpus": [2]}, "system peft runs on 1 gpus at most, found 2"),
    "a system with too many stages": (
        {"systems": ["megatron-fsdp"], "gpus": [2]},
        "system megatron-fsdp has 1 stages at most, found 2; replicas are its data_parallel",
    ),
    "a cell twice": ({"gpus": [1, 1]}, "is in the suite twice"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_bad_suite_is_one_line_with_file_and_key(tmp_path, name):
    change, message = CHANGES[name]
    data = yaml.safe_load(SMOKE.read_text())
    data |= {"cells": [data["cells"][0] | change], "gpus_per_node": 3}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError) as caught:
        read_suite(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping, found a list"),
        ("name: x", "description: field required"),
    ],
)
def test_a_file_that_is_no_suite_says_so(tmp_path, text, message):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_suite(path)


@pytest.mark.parametrize("name", ["paper", "Reference", "a/b", "..", ".a", "-a", "", "a b", "x" * 101, "a\n"])
def test_a_suite_has_a_name_that_a_folder_of_its_own_can_have(tmp_path, name):
    data = yaml.safe_load(SMOKE.read_text()) | {"name": name}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="suite.yaml: name: "):
        read_suite(tmp_path / "suite.yaml")


def test_an_unknown_suite_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="known suites: cpu-tiny, h200, h200-prompts, h200x2, paper-grid, smoke"):
        suite_path("nope")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such:plan", "no module named 'no'"),
        ("lorafusion.core.plan:nothing", "lorafusion.core.plan has no 'nothing'"),
        ("lorafusion.core.plan", "lorafusion.core.plan has no ''"),
    ],
)
def test_a_bad_import_path_is_named(path, message):
    with pytest.raises(UserError, match=f"planner '{path}': {message}"):
        load(path, "planner")


def test_the_configuration_hash_follows_what_a_run_depends_on():
    suite, systems = read_suite(SMOKE), read_systems()
    cell = cells(suite)[0]
    base = configuration_hash(suite, cell, systems[cell.system])
    more_repeats = suite.model_copy(update={"repeats": 9, "description": "other"})
    assert configuration_hash(more_repeats, cell, systems[cell.system]) == base
    assert configuration_hash(suite.model_copy(update={"seed": 2}), cell, systems[cell.system]) != base
    assert configuration_hash(suite, cell, systems["mlora"]) != base


def test_a_system_whose_package_is_missing_is_skipped_with_its_reason():
    system = read_systems()["lorafusion"]
    assert unavailable(system) == ""
    needy = system.model_copy(update={"requires": "no_such_package"})
    assert unavailable(needy) == "the package no_such_package is not installed"
