"""What the nodes of an attempt know of each other."""

from __future__ import annotations

from lorafusion.launch.attempt import attempt_at
from lorafusion.launch.outcome import Outcome


def test_the_first_node_knows_what_the_others_leave_for_it(tmp_path, monkeypatch):
    out = tmp_path / "repeat~1.json"
    with attempt_at(out, 1, None) as attempt:
        assert attempt.values() == []
    for node in (2, 1):
        monkeypatch.setenv("SLURM_NODEID", str(node))
        with attempt_at(out, 3, None) as attempt:
            attempt.put({"hostname": f"toy{node}"})
    monkeypatch.setenv("SLURM_NODEID", "0")
    with attempt_at(out, 3, lambda *arguments: Outcome("ok")) as attempt:
        assert attempt.launch(None, 3, 1.0).status == "ok"
        assert attempt.values() == [{"hostname": "toy1"}, {"hostname": "toy2"}]
    assert list(tmp_path.iterdir()) == []
