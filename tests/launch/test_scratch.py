"""The folder for temporary files is as it was, also where launchers were killed."""

from __future__ import annotations

import os
import signal
import tempfile
import time

import pytest

from lorafusion.launch.scratch import scratch_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_launcher_left_is_removed_and_no_others(temporary):
    (temporary / "lorafusion-mine").mkdir()
    pid = os.fork()
    if pid == 0:
        with scratch_folder():
            time.sleep(60)
        os._exit(0)
    while len(list(temporary.iterdir())) < 2:
        time.sleep(0.01)
    with scratch_folder() as folder:
        assert len(list(temporary.iterdir())) == 3, "it is at work"
        (folder / "x").touch()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with scratch_folder() as folder:
        assert sorted(temporary.iterdir()) == sorted([temporary / "lorafusion-mine", folder])
    assert list(temporary.iterdir()) == [temporary / "lorafusion-mine"]
