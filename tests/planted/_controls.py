"""Errors that are none, to see that `test_planted.py` tells. No area: they are in no table."""

from __future__ import annotations

from tests.planted.plant import planted

TEST = "tests/core/test_workload.py::test_scaling_is_alpha_over_rank_or_its_root"


@planted("lorafusion.core.workload:Job.scaling", caught_by=TEST)
def nothing_changes(original):
    """The symbol is replaced by itself."""
    return original


@planted("lorafusion.planning.simulator.gantt:save", caught_by=TEST)
def nothing_is_imported(original):
    """The test does not import the module."""
    return original


@planted("lorafusion.core.workload:Job.scaling", caught_by=TEST)
def the_error_itself_fails(original):
    """The replacement does not run."""
    return property(lambda job: job + 1)


@planted("lorafusion.core.workload:Job.scaling", caught_by="tests/core/test_workload.py::test_no_such_test")
def there_is_no_such_test(original):
    """The test that is named does not exist."""
    return property(lambda job: 0.0)
