"""Python imports this at its start, where its folder is on the path: see tests/planted/plant.py."""

import os
import sys
from pathlib import Path

if "LORAFUSION_PLANTED" in os.environ:
    sys.path.append(str(Path(__file__).parents[3]))
    from tests.planted.plant import install

    install(os.environ["LORAFUSION_PLANTED"])
