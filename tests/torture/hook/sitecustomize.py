"""Python imports this at its start, where its folder is on the path: see tests/torture/toy_workflow.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))
from tests.torture.toy_workflow import install

install()
