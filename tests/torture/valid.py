"""Valid inputs of every kind, which the hostile ones are made of by a change each."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lorafusion.core.config import CONFIGS
from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.planning import plan_system
from tests.torture.case import ROOT

JOBS = b"""model: tiny
tokenizer: tokenizer
output: out
device: cpu
capacity: 256
jobs:
  - name: first
    data: {jsonl: rows.jsonl, prompt: "{q}", completion: " {a}"}
    rank: 4
    steps: 2
  - name: second
    data: {synthetic: {samples: 8, scale: 64}}
    rank: 4
    steps: 2
"""
ROWS = b"".join(b'{"q": "question %d", "a": "answer %d"}\n' % (n, n) for n in range(12))
SUITE = b"""name: torture
description: a suite
device: cpu
dtype: float32
adapter_dtype: float32
repeats: 1
checks: {lossless: [1x1]}
cells:
  - models: [tiny]
    gpus: [1]
    workloads: [xsum]
    systems: [lorafusion, mlora]
    samples: 8
    global_batch: 4
    length_scale: 64
    capacity: 128
    minutes: 1
"""
COSTS = b"layers: [1, 1]\ntoken: 1.0e-6\n"
PROFILE = b"""version: 1
device: cuda
gpu_name: NVIDIA H200
dtype: bfloat16
made_from: {suite: h200, torch: 2.13.0}
fits:
  - model: tiny
    dimensions: {architecture: llama, hidden_size: 64, intermediate_size: 160, num_attention_heads: 4,
      num_key_value_heads: 2, vocab_size: 512}
    implementation: fused
    costs: {token: 1.0e-6, square: 1.0e-9, head: 2.0e-6, tile: 128}
    points: 8
    mean_error: 0.01
    worst_error: 0.02
"""
CURVES = b"job,trainer,step,loss\na,alone,0,1.0\na,together,0,1.0\na,alone,1,0.5\na,together,1,0.5\n"
PROFILE = (
    b"suite,bench,implementation,adapters,git_sha,gpu_name,class,milliseconds,kernels\n"
    b"h200,steps,fused,4,abc,NVIDIA H200,gemm,1.0,10\nh200,steps,peft,4,abc,NVIDIA H200,gemm,2.0,10\n"
)
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "{box}/model", "r": 4, "lora_alpha": 8,
    "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "bias": "none",
}  # fmt: skip
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.02, "torch_dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


@cache
def workload() -> Workload:
    samples = tuple(Sample(index, tokens) for index, tokens in enumerate((5, 3, 8, 2, 6, 9)))
    jobs = [Job(name=name, dataset="toy", rank=4, alpha=8.0, global_batch_size=2, samples=samples) for name in "ab"]
    return Workload(name="toy", jobs=tuple(jobs))


@cache
def plan() -> dict:
    return json.loads(plan_system(workload(), "lorafusion", stages=2, capacity=16, data_parallel=1).to_json())


@cache
def plan_with_graphs() -> dict:
    return json.loads(plan_system(workload(), "lorafusion", stages=2, capacity=16, graphs=True).to_json())


def text(value: dict) -> bytes:
    return json.dumps(value).encode()


def config(name: str) -> bytes:
    return (CONFIGS / name).read_bytes()


@cache
def tokenizer() -> dict[str, bytes]:
    from tests.tiny_tokenizer import save_tokenizer

    with TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@cache
def weights() -> bytes:
    """Of a model as `MODEL` says, of zeros."""
    import numpy as np
    from safetensors.numpy import save

    hidden, inner, keys, words = 32, 64, 16, 300
    shapes = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (words, hidden)}  # fmt: skip
    for layer in range(2):
        linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
                   "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
                   "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                   "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
                   "post_attention_layernorm": (hidden,)}  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linears.items()}
    return save({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, {"format": "pt"})


def model(folder: str = "model") -> dict[str, bytes]:
    files = {"config.json": text(MODEL), "model.safetensors": weights(), **tokenizer()}
    return {f"{folder}/{name}": content for name, content in files.items()}


def jobs_folder(jobs: bytes = JOBS, rows: bytes = ROWS) -> dict[str, bytes]:
    """A jobs file with its data and its tokenizer."""
    return {"jobs.yaml": jobs, "rows.jsonl": rows} | {f"tokenizer/{name}": data for name, data in tokenizer().items()}


@cache
def parquet() -> bytes:
    """A measurement table."""
    return (ROOT / "results/reference/cpu/planner.parquet").read_bytes()


@cache
def end_to_end() -> bytes:
    """A measurement table of systems."""
    return (ROOT / "results/reference/nvidia-h200/end_to_end.parquet").read_bytes()


@cache
def csv() -> bytes:
    """Some rows of the same table."""
    import io

    import pandas as pd

    return pd.read_parquet(io.BytesIO(parquet())).head(20).to_csv(index=False).encode()


def seal(name: str, content: bytes) -> bytes:
    """What lies beside a table, also beside a damaged one that somebody sealed again."""
    rows = max(0, content.count(b"\n") - 1) if name.endswith(".csv") else 0
    return f"# {rows} rows\n{hashlib.sha256(content).hexdigest()}  {name}\n".encode()


def sealed_files(name: str, content: bytes | Callable[[Path], None]) -> dict[str, bytes | Callable[[Path], None]]:
    """A table with its seal; something that is no file gets the seal of an empty one."""
    return {name: content, f"{name}.sha256": seal(name, content if isinstance(content, bytes) else b"")}


@cache
def result() -> dict:
    """A result file of a run that failed."""
    from lorafusion.core.seals import sealed

    return sealed({
        "version": 1, "status": "crash", "note": "it fell",
        "cell": {"suite": "smoke", "kind": "measured", "cell": "model~tiny/workload~xsum/gpus~1/system~mlora",
                 "system": "mlora", "model": "tiny", "workload": "xsum", "gpus": 1, "repeat": 1, "seed": 1},
        "expected": [{"metric": "throughput", "window": "whole"}], "metrics": [], "losses": {},
        "provenance": {"git_sha": "abc", "git_dirty": False, "config_hash": "c", "started_at": "2025-01-01T00:00:01"},
    })  # fmt: skip


def resealed(content: dict) -> bytes:
    """A changed result, sealed again, so that it is looked at."""
    from lorafusion.core.seals import sealed

    return text(sealed(content))


def json_of(content: bytes) -> dict:
    return json.loads(content)


@cache
def store() -> bytes:
    """Results behind a table."""
    lines = [{"table": "measurements.csv", "sha256": "0" * 64}, {"result": "r.json", "content": result()}]
    return gzip.compress(b"".join(text(line) + b"\n" for line in lines), mtime=0)


def tensors() -> list[str]:
    """The names in `weights`."""
    size = int.from_bytes(weights()[:8], "little")
    return [name for name in json_of(weights()[8 : 8 + size]) if name != "__metadata__"]
