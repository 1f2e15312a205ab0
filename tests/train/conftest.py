"""The training that tests play back."""

from __future__ import annotations

import pytest

from lorafusion.train import run as training
from lorafusion.train.run import DONE, train
from tests import forked
from tests.train import playback


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A training in one go, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "launch", forked.launch)
        assert train(playback.jobs_file(folder)) == DONE
    assert len(list((folder / "out/runs/000/checkpoints").glob("slot-*"))) >= 3
    return folder


@pytest.fixture
def played(recorded):
    with playback.played(recorded) as launched:
        yield launched
