"""The runs that make a file, one after another, on the nodes of one attempt at it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafusion.core.files import write
from lorafusion.launch.launch import launch
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.rendezvous import decided, leave, node_rank, shared_folder
from lorafusion.launch.spec import RunSpec


@dataclass(frozen=True)
class Attempt:
    """An attempt at a file. folder: what its nodes share, where they are several; run: as `launch.launch`."""

    nodes: int
    folder: Path
    run: Callable[..., Outcome]

    def launch(self, spec: RunSpec, processes: int, seconds: float, number: int = 0) -> Outcome:
        """Run a spec, as the attempt's run of this number."""
        if self.nodes == 1:
            return self.run(spec, processes, seconds)
        return self.run(spec, processes, seconds, self.nodes, self.folder / f"run-{number}")

    def put(self, values: dict[str, Any]) -> None:
        """Leave what this node knows for the first."""
        write(self.folder / f"of-node-{node_rank(os.environ)}.json", json.dumps(values))

    def values(self) -> list[dict[str, Any]]:
        """What the nodes have left."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("of-node-*.json"))]

    def decided(self, number: int, left: int, seconds: float) -> int:
        """How many trials are left after a run: as many as the first node says, which is waited for so long."""
        if self.nodes == 1:
            return left
        return int(decided(self.folder, f"left-{number}", str(left), os.environ, seconds) or 0)


def other_node() -> str:
    """What a node that is not the first of its run says at the end; empty on the first, which judges how it ended."""
    node = node_rank(os.environ)
    return f"node {node}: its processes have ended; the first node judges" if node else ""


@contextmanager
def attempt_at(out: Path, nodes: int, run: Callable[..., Outcome] | None) -> Iterator[Attempt]:
    """An attempt at a file, whose folder is removed at its end. run: as `launch.launch`, which is the default."""
    attempt = Attempt(nodes, shared_folder(out, os.environ), run or launch)
    yield attempt
    if nodes > 1 and node_rank(os.environ) == 0:
        leave(attempt.folder)
