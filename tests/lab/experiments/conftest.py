"""What tests of experiments share."""

import pytest
import yaml


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """Give an experiment a file with one suite of one bench; returns a function that changes the bench."""

    def of(experiment, bench):
        path = tmp_path / f"{experiment.name}.yaml"
        monkeypatch.setattr(experiment, "config", path)

        def write(**changes):
            entry = {"device": "cpu", "dtype": "float32", "rounds": 1, "benches": {"toy": bench | changes}}
            path.write_text(yaml.safe_dump({"small": entry}))
            return experiment.entry_of("small")

        write()
        return write

    return of
