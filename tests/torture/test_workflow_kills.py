"""A workflow that is killed a few times; `make torture` kills it thirty times."""

from __future__ import annotations

import pytest

from tests.torture import workflow_kills


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_workflow_that_is_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it is left for the workflow's folder
    assert workflow_kills.run(3, 1, tmp_path / "workflow") == []
