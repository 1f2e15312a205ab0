"""What is installed is the same by every way: the lock, conda's file of it, and the ranges of the packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OURS = {"fused-lora", "lorafusion"}
# Of extras: no test reads a dataset of the hub, and no CPU has cuDNN.
UNLOCKED = {"datasets", "nvidia-cudnn-frontend"}


def locked() -> dict[str, str]:
    """Versions by package; torch's is that of requirements.in, of which a machine takes one of several builds."""
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.in").read_text(), re.MULTILINE)[0]
    lines = [torch, *(ROOT / "requirements.lock").read_text().splitlines()]
    pins = [re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", line) for line in lines]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def test_each_package_of_the_lock_has_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) > 100
    assert [block for block in blocks if "--hash=sha256:" not in block] == []
    assert re.search(r"^(torch|nvidia-\w+)==", lock, re.MULTILINE) is None
    assert "--require-hashes" in (ROOT / "tools" / "install.sh").read_text()


def requirements(path: str) -> list[Requirement]:
    """Of a package and of all its extras."""
    project = tomllib.loads((ROOT / path).read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]


@pytest.mark.parametrize("path", ["pyproject.toml", "kernels/pyproject.toml"])
def test_the_lock_pins_all_that_a_package_asks_for_in_its_range(path):
    pins = locked()
    for requirement in requirements(path):
        name = canonicalize_name(requirement.name)
        if name not in OURS | UNLOCKED:
            assert requirement.specifier.contains(pins[name]), f"{requirement}, but {pins[name]} is locked"


def test_the_file_of_conda_has_a_python_and_the_commands_for_the_lock():
    text = (ROOT / "environment.yml").read_text()
    conda = yaml.safe_load(text)["dependencies"]
    assert "--require-hashes --no-deps --requirement requirements.lock" in text
    assert f"torch=={locked()['torch']}+cpu" in text
    python = next(line.partition("=")[2] for line in conda if line.startswith("python="))
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{supported}").specifier.contains(f"{python}.0")
