"""The labels of what the report shows, in every suite: Snakemake's page needs more than it says.

Where a label but the first has two values, each for half of a list of results, the page offers a toggle, and breaks
where a result has no counterpart. A list is a category or what a search finds, so that no care with values helps: one
label has no toggle. Two results with the same label in a category would be one line.
"""

from __future__ import annotations

from collections import Counter

import pytest

from lorafusion.core.config import names_in
from lorafusion.lab.steps import dag_of


@pytest.mark.parametrize("suite", sorted(names_in("suites")))
def test_a_result_has_a_label_which_no_other_of_its_category_has(suite):
    labels = Counter(
        (step.kind.category, label.format(name=step.name))
        for step in dag_of(suite).steps
        for label in step.kind.labels.values()
    )
    assert {category for category, _ in labels} == {"Checks", "Figures", "Measurements"}
    assert set(labels.values()) == {1}


@pytest.mark.parametrize("suite", sorted(names_in("suites")))
def test_the_label_of_a_step_with_a_name_has_that_name(suite):
    for kind in dag_of(suite).kinds:
        assert all("{name}" in label for label in kind.labels.values()) or not kind.has_name
