"""What is wrong with a base model's files is said before anything is made of them, and nothing else is read or run."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorafusion.core.config import read_model
from lorafusion.core.schema import LONGEST, UserError
from lorafusion.data.encoder import load_encoder
from lorafusion.model.description import huggingface_model
from lorafusion.model.pretrained import ROPES, identity, look_at, require_weights, tensors
from lorafusion.model.stage import Stage, build_stage, hf_config
from tests.tiny_tokenizer import save_tokenizer

TINY = read_model("tiny")
QWEN = TINY.model_copy(update={"architecture": "qwen2"})
UP = "model.layers.0.mlp.up_proj.weight"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint in one file, and in several."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(TINY))
    for name, size in (("single", "1GB"), ("sharded", "200KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        save_tokenizer(folder / name)
    return {name: folder / name for name in ("single", "sharded")}


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return shutil.copytree(saved["single"], tmp_path / "model")


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    return shutil.copytree(saved["sharded"], tmp_path / "model")


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        look_at(str(folder))
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert len(message) <= LONGEST
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("config", [TINY, QWEN, TINY.model_copy(update={"tie_word_embeddings": True})])
def test_the_tensors_of_a_checkpoint_are_those_of_the_whole_model(config):
    stage = {name: tuple(value.shape) for name, value in Stage(config, 0, 1).named_parameters()}
    if config.tie_word_embeddings:
        del stage["lm_head.weight"]  # the embedding's
    assert dict(tensors(config)) == stage


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_whole_checkpoint_passes(saved, kind):
    look_at(str(saved[kind]))
    require_weights(huggingface_model(str(saved[kind])))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_attention_heads": 0}, ("num_attention_heads", "(found 0)")),
        ({"num_attention_heads": 3}, ("num_attention_heads", "a divisor of hidden_size 64, found 3")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "(found 0)")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "1000000000")),
        ({"hidden_size": 10**30}, ("hidden_size",)),
        ({"vocab_size": None}, ("vocab_size: field required",)),
        ({"model_type": "x" * 5000}, ("model_type", "supported: llama, qwen2")),
        ({"model_type": ["llama"]}, ("model_type",)),
        ({"hidden_act": "gelu"}, ("hidden_act is 'gelu', supported for llama is 'silu'",)),
        ({"head_dim": 32}, ("head_dim is 32, supported is 16",)),
        ({"quantization_config": {"load_in_4bit": True}}, ("quantization_config",)),
        ({"rope_parameters": {"rope_type": "spiral"}}, ("unknown rope_type 'spiral'",)),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ("rope_parameters.factor", "found None")),
        ({"rope_parameters": {"rope_theta": 0}}, ("rope_parameters.rope_theta", "found 0")),
        ({"rope_parameters": [1]}, ("rope_parameters: expected a mapping, found list",)),
        ({"auto_map": {"AutoConfig": "code.Config"}}, ("auto_map", "never run")),
        ({"num_hidden_layers": 5}, ("no tensor 'model.layers.4.",)),
        ({"num_hidden_layers": 3}, ("a tensor 'model.layers.3.", "expected none of this name in 3 layers")),
        ({"intermediate_size": 32}, ("has shape", "the model expects")),
    ],
)  # fmt: skip
def test_a_description_that_cannot_be_is_refused(single, changes, parts):
    edit(single / "config.json", **changes)
    refused(single, *parts)


@pytest.mark.parametrize("text", ["[]", "", "null", '{"a": NaN}', "[" * 100_000, '{"model_type": "llama"', "\0\1\2"])
def test_a_description_that_is_none_is_refused(single, text):
    (single / "config.json").write_text(text)
    refused(single, "config.json")


def test_the_rotary_embeddings_are_some_of_those_of_transformers():
    assert set(ROPES) <= {"default", *ROPE_INIT_FUNCTIONS}


def rewritten(path: Path, header: dict | bytes) -> None:
    content = path.read_bytes()
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a header beyond all": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "nonsense": lambda path: rewritten(path, b"nonsense"),
    "a list": lambda path: rewritten(path, b"[]"),
    "an unknown dtype": lambda path: rewritten(path, header_of(path) | {UP: header_of(path)[UP] | {"dtype": "Z9"}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(single, damage):
    DAMAGES[damage](single / "model.safetensors")
    refused(single, "model.safetensors: damaged, expected a whole safetensors file")


def test_tensors_of_other_names_shapes_and_dtypes_are_named(single):
    path = single / "model.safetensors"
    header = header_of(path)
    others = {name: entry for name, entry in header.items() if name != UP}
    for changed, parts in (
        (others | {"other": header[UP]}, (f"no tensor '{UP}'",)),
        (
            header | {UP: header[UP] | {"shape": header[UP]["shape"][::-1]}},
            (UP, "has shape (64, 160)", "expects (160, 64)"),
        ),
        (header | {UP: header[UP] | {"dtype": "I32"}}, (UP, "is of I32")),
    ):
        rewritten(path, changed)
        refused(single, *parts)


def test_pickled_weights_are_not_loaded(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "expected weights in safetensors", "pytorch_model.bin", "never loaded")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a/../../b", 3, None, "\0"])
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded, name):
    path = sharded / "model.safetensors.index.json"
    edit(path, weight_map=json.loads(path.read_text())["weight_map"] | {UP: name})
    refused(sharded, f"index.json: weight_map.{UP}: expected a file of the model's folder, found {str(name)!r}")


@pytest.mark.parametrize("shards", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(sharded, shards):
    edit(sharded / "model.safetensors.index.json", weight_map=shards)
    refused(sharded, "index.json: weight_map: expected the file of each tensor")


def test_a_shard_that_is_gone_or_another_is_named(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].rename(sharded / "aside")
    refused(sharded, shards[1].name)
    shutil.copy(shards[0], shards[1])
    refused(sharded, shards[1].name, "no tensor", "index.json says so")


def test_a_file_that_is_none_is_refused_and_not_waited_for(single):
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    refused(single, "model.safetensors: expected a regular file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(single, tmp_path, name):
    (single / name).rename(tmp_path / "elsewhere")
    (single / name).symlink_to(tmp_path / "elsewhere")
    refused(single, f"{name}: a link to {tmp_path / 'elsewhere'}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_neither_run_nor_asked_about(single, monkeypatch, name):
    for kind in ("Config", "Tokenizer"):
        (single / "code.py").write_text(f"import pathlib\npathlib.Path('{single}/PWNED').touch()\n")
        edit(single / name, auto_map={f"Auto{kind}": f"code.{kind}"}, tokenizer_class="Tokenizer", model_type="own")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(UserError, match=f"{name}: auto_map: it names code of its own, which is never run"):
        (huggingface_model if name == "config.json" else load_encoder)(str(single))
    assert not (single / "PWNED").exists()


@pytest.fixture
def cached(saved, tmp_path, monkeypatch):
    """acme/tiny in a cache of the hub, as revision v2: links to files beside their folder. There is no network."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for index, path in enumerate(saved["single"].iterdir()):
        shutil.copy(path, repository / "blobs" / f"{index:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:040}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_model_in_the_hubs_cache_needs_no_network(cached, saved):
    look_at("acme/tiny", "v2")
    model = huggingface_model("acme/tiny", "v2")
    assert (model.weights, model.revision) == ("acme/tiny", "v2")
    options = {"index": 0, "count": 1, "device": torch.device("cpu"), "dtype": torch.float32, "seed": 1}
    local = huggingface_model(str(saved["single"]))
    ours, theirs = (build_stage(config, **options).state_dict() for config in (model, local))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_encoder("acme/tiny", "v2").tokenizer.eos_token == "</s>"
    assert identity(model)["weights"] == f"acme/tiny@{COMMIT}"
    look_at(str(cached))  # the folder of the cache itself, whose links lead out of it
    (cached / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not reached, and its cache has no model.safetensors"):
        look_at("acme/tiny", "v2")


def test_a_model_is_known_by_what_is_in_its_folder(single, tmp_path):
    before = identity(huggingface_model(str(single)))
    moved = single.rename(tmp_path / "elsewhere")
    assert identity(huggingface_model(str(moved))) == before
    path = moved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    after = identity(huggingface_model(str(moved)))
    assert {key for key in before if before[key] != after[key]} == {"weights"}


def test_a_hub_that_cannot_be_reached_is_not_asked_again(monkeypatch):
    """Each file that the cache lacks was tried for half a minute, by the workers too."""

    def download(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("lorafusion.core.hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(UserError, match="model 'acme/tiny': neither .* not reached, and its cache has no"):
        look_at("acme/tiny")
    assert (os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE) == ("1", True)
