"""A copy of the checkout, in which a test may add files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lorafusion.core.config import CONFIGS

ROOT = CONFIGS.parent
PARTS = ("lorafusion", "baselines", "configs", "kernels", "workflow", "examples", "Snakefile", "environment.yml")
# A file is named in the line above its block.
FILE = re.compile(r"^`([\w./-]+)`(, at its end)?:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Checkout:
    """A copy of what runs of this checkout need, which they import in its place."""

    def __init__(self, folder: Path) -> None:
        self.root, programs = folder / "checkout", folder / "bin"
        self.root.mkdir()
        programs.mkdir()
        for name in PARTS:
            source, skipped = ROOT / name, shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=skipped)
            else:
                shutil.copy(source, self.root / name)
        # What is installed calls the entry points of the checkout that it was installed from.
        for name, command in (("lorafusion", "lorafusion.cli.main"), ("snakemake", "snakemake --dry-run")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {command} "$@"\n')
            (programs / name).chmod(0o755)
        paths = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        self.environment = os.environ | {"PYTHONPATH": paths, "PATH": path, "OMP_NUM_THREADS": "1"}

    def write_files(self, document: str) -> list[str]:
        """Write the files that a document shows; returns their names."""
        found = FILE.findall(document)
        for name, at_end, text in found:
            path = self.root / name
            assert path.exists() == bool(at_end), name
            path.write_text((path.read_text() if at_end else "") + text)
        return [name for name, _, _ in found]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def shell(self, commands: str) -> str:
        return self.run("bash", "-euo", "pipefail", "-c", commands)
