"""Every number that README.md and docs/ quote is that of a table in results/, and there is no other."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable

import pandas as pd
import pytest

from lorafusion.core.seals import seal
from lorafusion.lab.report.drawing import read_data
from lorafusion.lab.table.table import read_unsealed
from tests.numbers import end_to_end, kernels, others, planner, sources, steps
from tests.numbers.documents import ROOT, read
from tests.numbers.quoted import BLOCK, MARKED, missing, one_line, plain, untied

THROUGHPUTS = ("throughput", "throughput_padded")
NOTHING: Callable[[], list[str]] = list
# What each document takes from tables, besides words.
TIED: dict[str, Callable[[], list[str]]] = {
    "README.md": others.readme,
    "CONTRIBUTING.md": NOTHING,
    "docs/guide/add-a-system.md": NOTHING,
    "docs/guide/install.md": NOTHING,
    "docs/guide/many-gpus.md": NOTHING,
    "docs/guide/patch.md": NOTHING,
    "docs/guide/plan.md": NOTHING,
    "docs/guide/reproduce.md": others.reproduce,
    "docs/guide/slurm.md": NOTHING,
    "docs/guide/train.md": NOTHING,
    "docs/reference/command-line.md": NOTHING,
    "docs/reference/costs.md": NOTHING,
    "docs/reference/jobs-file.md": others.jobs_file,
    "docs/reference/kernels.md": NOTHING,
    "docs/reference/measurements.md": others.measurements,
    "docs/reference/planner.md": planner.constants,
    "docs/reference/robustness.md": others.robustness,
    "docs/reference/slurm-site.md": others.slurm_site,
    "docs/reference/suites.md": NOTHING,
    "docs/reference/systems.md": others.systems,
    "docs/reference/words.md": NOTHING,
    "docs/results/end-to-end.md": end_to_end.passages,
    "docs/results/kernels.md": kernels.passages,
    "docs/results/planner.md": planner.results,
    "docs/results/steps.md": steps.passages,
}
GENERATED = {"docs/reference/planted-errors.md"}  # from tests/planted/, and its numbers say how wrong an error is
CACHES = (sources.table, sources.drawn, end_to_end.end_to_end_table, end_to_end.profile, kernels.rows, planner.over)


def test_every_document_is_looked_at():
    documents = {"README.md", "CONTRIBUTING.md"}
    documents |= {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert documents - GENERATED == set(TIED)


@pytest.mark.parametrize("document", TIED)
def test_every_number_of_a_document_is_that_of_its_table(document):
    passages = TIED[document]()
    assert missing(read(document), passages) == []
    assert untied(read(document), passages) == []


@pytest.mark.parametrize("document", [name for name, passages in TIED.items() if passages is not NOTHING])
def test_no_digit_of_a_document_can_be_changed_unseen(document):
    """20 digits of its numbers, one at a time: 1.134 becomes 1.334."""
    passages = TIED[document]()
    text, chance = one_line(BLOCK.sub(" ", read(document))), random.Random(document)
    for _ in range(20):
        passage = one_line(chance.choice([one for one in passages if MARKED.search(one)]))
        number = chance.choice(list(MARKED.finditer(passage)))
        place = chance.choice([i for i, letter in enumerate(number[1]) if letter.isdigit()])
        other = chance.choice([digit for digit in "0123456789" if digit != number[1][place]])
        start = text.index(plain(passage)) + len(plain(passage[: number.start()])) + place
        changed = text[:start] + other + text[start + 1 :]
        assert missing(changed, passages), f"{passage} with {other} at {place}"


@pytest.fixture
def falsified(tmp_path, monkeypatch):
    """Copies the tables of results/reference, with a change to one of them under a seal of its own."""

    def falsify(name: str, change: Callable[[pd.DataFrame], None]) -> None:
        folder = tmp_path / "reference"
        shutil.copytree(sources.REFERENCE, folder, ignore=shutil.ignore_patterns("*.png", "*.pdf"))
        path = folder / f"{name}.parquet"
        if path.exists():
            rows = read_unsealed(path)
            change(rows)
            rows.to_parquet(path)
        else:
            path = path.with_suffix(".csv")
            rows = read_data(path)
            change(rows)
            path.write_text(rows.to_csv(index=False))
        seal(path)
        monkeypatch.setattr(sources, "REFERENCE", folder)
        forget()

    yield falsify
    monkeypatch.undo()
    forget()


def forget() -> None:
    for cache in CACHES:
        cache.cache_clear()


def scaled(column: str = "value", factor: float = 1.02, **where: str) -> Callable[[pd.DataFrame], None]:
    """Multiplies a column of the rows that have these values."""

    def change(rows: pd.DataFrame) -> None:
        chosen = rows[column].notna()
        for name, value in where.items():
            chosen &= (rows[name] == value).fillna(False).astype(bool)
        assert chosen.any()
        rows.loc[chosen, column] *= factor

    return change


def faster(factor: float) -> Callable[[pd.DataFrame], None]:
    """Makes the runs of lorafusion faster: a table whose throughputs alone are higher contradicts itself."""
    changes = [scaled(system="lorafusion", metric=metric, factor=factor) for metric in THROUGHPUTS]
    changes.append(scaled(system="lorafusion", metric="time", window="whole", factor=1 / factor))

    def change(rows: pd.DataFrame) -> None:
        for one in changes:
            one(rows)

    return change


@pytest.mark.parametrize(
    ("document", "table", "change"),
    [
        ("README.md", "nvidia-h200/end_to_end", faster(1.005)),
        ("docs/results/end-to-end.md", "nvidia-h200/end_to_end", faster(1.01)),
        ("docs/results/end-to-end.md", "nvidia-h200/end_to_end", scaled(system="lorafusion", metric="peak_memory")),
        ("docs/results/end-to-end.md", "nvidia-h200/hosts/b8aa11e", scaled(implementation="canary-gemm", factor=1.01)),
        ("docs/results/end-to-end.md", "nvidia-h200/end_to_end_profile", scaled("milliseconds", system="mlora")),
        ("docs/results/kernels.md", "nvidia-h200/kernels", scaled(metric="overhead", implementation="peft")),
        ("docs/results/steps.md", "nvidia-h200/steps", scaled(metric="busy", factor=0.99)),
        ("docs/results/planner.md", "cpu/planner", scaled(metric="bubble", system="fast")),
    ],
    ids=lambda value: value if isinstance(value, str) else "changed",
)
def test_a_table_that_changed_is_seen(falsified, document, table, change):
    falsified(table, change)
    assert missing(read(document), TIED[document]())


@pytest.mark.parametrize(
    "claim",
    [
        "LoRAFusion is 1.42 times as fast.",
        "It trains 17,500 tokens a second.",
        "It trains 8192 tokens a second.",
        "It saves 30 % of the memory.",
        "A microbatch takes 12 ms.",
        "The speedup is 2.",
        "It needs 56 GiB.",
        "A linear launches 150 kernels.",
        "It has 0.9 of PEFT's time.",
        "| `lorafusion` | 17,131 |",
        "Over rank 16 it gains 1.2.",
    ],
)
def test_a_number_without_a_table_is_seen(claim):
    assert untied(f"# Title\n\n{claim}\n", [])
    assert untied(read("README.md") + f"\n{claim}\n", others.readme())


@pytest.mark.parametrize(
    "text",
    [
        "On one H200, torch 2.11 and Python 3.11 or 3.12.",
        "Llama-3.1-8B with rank 16, dropout 0.1 and global batches of 8.",
        "Four adapters with 16 samples each and microbatches of at most 8192 tokens.",
        "Ranks 16 to 128, sm_90, float64, 1F1B, commit 8c7b494.",
        "A linear 4096 → 14336 on 2 GPUs, with a 95 % interval.",
        "```\n1.42 times\n```",
        "`1.42` [there](results/1.42.png)",
    ],
)
def test_what_is_no_measurement_needs_no_table(text):
    assert untied(text, []) == []


def test_a_passage_has_to_be_there_once():
    assert missing("a 1 b", ["a 1"]) == []
    assert missing("a 1 b a 1", ["a 1"]) == ["a 1"]
    assert missing("a\n1 b", ["a 1"]) == []
    assert missing("a 2", ["a 1"]) == ["a 1"]


def test_the_tables_that_are_quoted_are_sealed():
    for path in sorted([*sources.REFERENCE.rglob("*.csv"), *sources.REFERENCE.rglob("*.parquet")]):
        assert re.search(r"^[0-9a-f]{64}  ", path.with_name(path.name + ".sha256").read_text(), re.MULTILINE), path
