import pytest

from tests.lab.cluster.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)
