"""What an installation of the package holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def test_a_wheel_has_every_module_and_the_tuned_files(tmp_path):
    source = shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {
        str(path.relative_to(KERNELS))
        for pattern in ("*.py", "*.json")
        for path in (KERNELS / "fused_lora").rglob(pattern)
    }
