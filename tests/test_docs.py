"""What the documents say can be done is done here as they say it, and the names in them exist."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator

import click
import pandas as pd
import pytest
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from lorafusion.cli.main import app
from lorafusion.core.config import CONFIGS, SystemConfig, read_systems
from lorafusion.core.plan import Plan, check
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.suite import Grid, Suite
from lorafusion.train.config import JOB_KEYS, TrainConfig, read_train_config
from tests.checkout import Checkout

ROOT = CONFIGS.parent
DOCS = ROOT / "docs"
GUIDE = (DOCS / "guide" / "add-a-system.md").read_text()
SYSTEMS_PAGE = (DOCS / "reference" / "systems.md").read_text()
SYSTEMS = read_systems()
SHOWN = ("lorafusion", "shortest", "shortest-loop", "shortest-dense")  # what the guide measures
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path)
    assert made.write_files(GUIDE) == [
        "baselines/shortest.py",
        "baselines/loop.py",
        "baselines/dense.py",
        "configs/systems.yaml",
        "configs/suites/shortest.yaml",
    ]
    return made


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_of_a_new_system_works_as_it_is_written(checkout):
    modules = ("lorafusion", "baselines", "fused_lora", "baselines.shortest")
    code = f"import {', '.join(modules)}; print({', '.join(f'{name}.__file__' for name in modules)})"
    imported = checkout.run(sys.executable, "-c", code)
    assert imported.count(str(checkout.root)) == len(modules)
    assert not (ROOT / "baselines" / "shortest.py").exists()
    commands, _ = SHELL.findall(GUIDE)
    checkout.shell(commands)
    out, cell = checkout.root / "results" / "shortest", "model~tiny/workload~heterogeneous/gpus~1/batch~4"

    alone = out / "plans" / cell / "system~shortest.json"
    plans = ((out / "two-stages.json", out / "workload.json", 2), (alone, out / "workloads" / f"{cell}.json", 1))
    for path, source, stages in plans:
        plan, workload = Plan.read(path), Workload.read(source)
        check(plan, workload)
        assert (plan.system, plan.stages, plan.statistics.tokens) == ("shortest", stages, workload.tokens)
        assert max(len(microbatch.segments) for microbatch in plan.microbatches) == 1
    assert _order(Plan.read(alone)) == sorted(range(len(workload.jobs)), key=lambda index: workload.jobs[index].tokens)
    assert (out / "two-stages.png").stat().st_size > 0

    verdict = json.loads((out / "exact.json").read_text())
    assert verdict["passed"]
    for system in ("shortest", "shortest-loop", "shortest-dense"):
        assert any(figure.startswith(f"{system} ") for figure in verdict["figures"])

    for system in SHOWN:
        result = json.loads((out / "runs" / cell / f"system~{system}" / "repeat~1.json").read_text())
        assert (result["status"], result["cell"]["system"]) == ("ok", system)
    table = pd.read_csv(out / "measurements.csv")
    assert set(table["status"]) == {"ok"}
    assert set(table["system"].dropna()) == set(SHOWN)
    assert (out / "figures" / "end_to_end~tiny.png").stat().st_size > 0


def _order(plan: Plan) -> list[int]:
    """The adapters of a plan by their first microbatch."""
    return list(dict.fromkeys(part.adapter for microbatch in plan.microbatches for part in microbatch.segments))


def test_the_workflow_would_run_every_cell_of_the_example(checkout):
    _, workflow = SHELL.findall(GUIDE)
    assert re.search(r"^run +4$", checkout.shell(workflow), re.MULTILINE)


def test_the_guide_has_every_key_of_an_entry():
    table = GUIDE.partition("| key of an entry |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(SystemConfig.model_fields)


def code_spans(document: str) -> list[str]:
    without_blocks = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", without_blocks)


# A page of reference, the heading of a table of keys, and the class that has them, with keys of the file alone.
KEYS = [
    ("jobs-file.md", "Keys of the file", {*TrainConfig.model_fields, "defaults"} - {"path"}),
    ("jobs-file.md", "Keys of a job", JOB_KEYS),
    ("suites.md", "Keys of a suite", set(Suite.model_fields)),
    ("suites.md", "Keys of a block", set(Grid.model_fields)),
    ("slurm-site.md", "Keys of a site", set(Site.model_fields)),
]


@pytest.mark.parametrize(("page", "heading", "keys"), KEYS, ids=[heading for _, heading, _ in KEYS])
def test_every_key_of_a_file_is_described(page, heading, keys):
    section = (DOCS / "reference" / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(keys)


def test_every_command_is_described():
    page = (DOCS / "reference" / "command-line.md").read_text()
    described = re.findall(r"^\| `(lorafusion [a-z -]+?)(?: [A-Z-].*| jobs.yaml)?`", page, re.MULTILINE)
    assert sorted({line.strip() for line in described}) == sorted(commands(typer.main.get_command(app), "lorafusion"))


def commands(group: click.Group, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}"


@pytest.mark.parametrize("page", ["README.md", "docs/guide/train.md"])
def test_the_jobs_files_of_the_documents_are_valid(page, tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "jobs.yaml").write_text(text)
    for name in ("support.jsonl", "letters.txt", "essays.txt"):
        (tmp_path / name).write_text('{"question": "why?", "answer": "so"}\n')
    assert read_train_config(tmp_path / "jobs.yaml").output == tmp_path / "adapters"


def test_the_readme_is_short_and_its_python_works():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    base_model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                              num_attention_heads=2, vocab_size=32))  # fmt: skip
    names = {"base_model": base_model}
    exec(code, names)
    assert any("_fused_lora" in name for module in names["model"].modules() for name in vars(module))


def test_every_system_is_described():
    described = re.findall(r"^\| `([\w-]+)` \|", SYSTEMS_PAGE, re.MULTILINE)
    assert sorted(described) == sorted(SYSTEMS)


def test_the_names_of_the_configuration_in_the_description_exist():
    """There a word of small letters in code is a system, a key, or an option of a planner; so is one before a colon."""
    keys = {*SystemConfig.model_fields, *Suite.model_fields, *Grid.model_fields}
    for system in SYSTEMS.values():
        keys |= inspect.signature(load(system.planner, "planner")).parameters.keys()
    for span in code_spans(SYSTEMS_PAGE):
        if re.fullmatch(r"[a-z][a-z0-9_-]*", span):
            assert span in SYSTEMS or span in keys, span
        elif found := re.fullmatch(r"([a-z_]+): .+", span):
            assert found[1] in keys, span
        elif re.fullmatch(r"(baselines|lorafusion)[\w.]*:\w+", span):
            assert callable(load(span, "function")), span
        elif "/" in span and " " not in span and "://" not in span and not span.startswith("results/SUITE"):
            assert (ROOT / span).exists(), span


PAGES = sorted([*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *DOCS.rglob("*.md")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text()):
        if "://" not in link:
            file, _, place = link.partition("#")
            target = (path.parent / file) if file else path
            assert target.exists(), link
            assert not place or place in anchors(target.read_text()), link


def anchors(document: str) -> set[str]:
    """What headings are linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
