"""The product where it is installed from wheels: no checkout, none of the laboratory's packages, any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lorafusion.core.config import CONFIGS

ROOT = CONFIGS.parent
# What only extras bring, and what is ours.
HIDDEN = {"pandas", "pyarrow", "seaborn", "matplotlib", "wandb", "snakemake", "datasets", "megatron", "lorafusion",
          "fused_lora"}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with the wheels of a source distribution, and of the packages here all but the hidden."""
    folder = tmp_path_factory.mktemp("installed")
    sources, wheels, place = folder / "sources", folder / "wheels", folder / "venv"
    skipped = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in ("lorafusion", "configs", "kernels"):
        shutil.copytree(ROOT / name, sources / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements.lock"):
        shutil.copy(ROOT / name, sources / name)
    distribution = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
    made = run(sys.executable, "-c", distribution, cwd=sources).splitlines()[-1]
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "wheel", *offline, "--wheel-dir", wheels, sources / made, sources / "kernels", cwd=folder)
    shutil.rmtree(sources)
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=folder)
    packages = next((place / "lib").glob("python*")) / "site-packages"
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        name = path.name.split("-")[0].removeprefix("__editable__").strip("_.")
        if name.split(".")[0].lower() not in HIDDEN and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    run(*pip, "--python", place / "bin" / "python", "install", *offline, *wheels.glob("*.whl"), cwd=folder)
    return place


def run(*command, cwd: Path, status: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def test_it_trains_and_plans_in_any_folder(installed, tmp_path):
    (tmp_path / "jobs.yaml").write_text(
        "model: tiny\noutput: out\nprocesses: 2\ndevice: cpu\njobs:\n"
        "  - {name: a, data: {synthetic: {samples: 8, scale: 32}}, rank: 4}\n"
        "  - {name: b, data: {synthetic: {samples: 8, scale: 32, dataset: mixed}}, rank: 8}\n"
    )
    lorafusion = installed / "bin" / "lorafusion"
    run(lorafusion, "train", "jobs.yaml", cwd=tmp_path)
    for name, rank in (("a", 4), ("b", 8)):
        folder = tmp_path / "out" / "adapters" / name
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        assert not (folder / "loss.png").exists()
        assert "loss.png" not in (folder / "README.md").read_text()
    run(lorafusion, "plan", "jobs.yaml", "--out", "plan.json", cwd=tmp_path)
    run(lorafusion, "workload", "mixed", "--samples", 8, "--out", "workload.json", cwd=tmp_path)
    run(lorafusion, "plan", "workload.json", "--system", "megatron-pp", "--out", "other.json", cwd=tmp_path)
    assert "stage 1" in run(lorafusion, "plan", "show", "plan.json", cwd=tmp_path)


PATCHED = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from fused_lora import patch
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=2, vocab_size=64))
model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
print(patch(model))
ids = torch.arange(16)[None]
model(input_ids=ids, labels=ids).loss.backward()
"""


def test_it_patches_a_model(installed, tmp_path):
    said = run(installed / "bin" / "python", "-c", PATCHED, cwd=tmp_path)
    assert "fused_lora: 14 LoRA linears patched" in said


MISSING = {
    "a baseline's planner": (
        ["plan", "w.json", "--system", "mlora", "-o", "p.json"],
        "error: planner 'baselines.mlora.planner:plan': baselines need a checkout of the repository\n",
    ),
    "the laboratory": (
        ["lab", "list", "smoke"],
        "error: lorafusion lab: needs the package pandas: pip install 'lorafusion[lab]'\n",
    ),
    "the workflow": (
        ["reproduce"],
        "error: the workflow: needs a checkout of the repository, which has its Snakefile\n",
    ),
    "a picture": (
        ["plan", "show", "p.json", "-o", "p.png"],
        "error: p.png: needs the package matplotlib: pip install 'lorafusion[lab]'\n",
    ),
}


@pytest.mark.parametrize("name", list(MISSING))
def test_what_is_not_installed_says_how_to_get_it(installed, tmp_path, name):
    arguments, message = MISSING[name]
    run(installed / "bin" / "lorafusion", "workload", "xsum", "--samples", 8, "-o", "w.json", cwd=tmp_path)
    run(installed / "bin" / "lorafusion", "plan", "w.json", "-o", "p.json", cwd=tmp_path)
    assert run(installed / "bin" / "lorafusion", *arguments, cwd=tmp_path, status=2).endswith(message)
