"""A base model's folder or repository, looked at before anything is made of it: what its config.json and the headers of
its weights say. Without torch, so that what is wrong with them is said at once."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorafusion.core.config import ModelConfig
from lorafusion.core.files import read_json
from lorafusion.core.hub import absent, file_at_hand, file_of, is_inside, read_settings, require_no_links
from lorafusion.core.schema import UserError, one_of, validated

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt")
FLOATS = ("F64", "F32", "F16", "BF16")
# The rotary embeddings that a stage computes, and what each must state.
ROPES = {"default": (), "dynamic": ("factor",), "linear": ("factor",), "yarn": ("factor",),
         "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}  # fmt: skip
# What changes what a model of a known family computes, and is not among the dimensions of a `ModelConfig`.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0,
         "quantization_config": None}  # fmt: skip
# What a look has no use for, and transformers fills in where a config.json does not say it.
UNSAID = {"max_position_embeddings": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
SAMPLES, SAMPLE = 256, 4096  # pieces of a file of weights, and the bytes of each, that tell it from others


def look_at(source: str, revision: str | None = None, weights: bool = True) -> None:
    """Raise `UserError` for a folder or repository that cannot be the base model of a training. weights: is it to have
    them, too?"""
    require_no_links(source)
    model = _outline(source, revision)
    if weights:
        require_weights(model)


def _outline(source: str, revision: str | None) -> ModelConfig:
    """The model that a config.json describes, but for what `UNSAID` has."""
    where = f"{source}/{CONFIG}"
    settings = read_settings(source, CONFIG, revision)
    if settings is None:
        raise absent(source, f"no {CONFIG}", ", expected a base model's folder or repository")
    kind = settings.get("model_type")
    families = ModelConfig.model_fields["architecture"].annotation.__args__
    if kind not in families:
        raise UserError(
            f"{where}: model_type: architecture {str(kind)[:40]!r} is not supported; supported: {', '.join(families)}"
        )
    for key, value in FIXED.items():
        if settings.get(key) not in (None, value):
            actual = repr(settings[key])[:60]
            raise UserError(f"{where}: {key} is {actual}, supported for {kind} is {value!r}")
    stated = {name: settings[name] for name in ModelConfig.model_fields if settings.get(name) is not None}
    stated |= {"architecture": kind, "weights": source, "revision": revision}
    stated["rope_parameters"] = _rope(settings, where)
    heads = {"num_key_value_heads": settings.get("num_attention_heads")}
    model = validated(ModelConfig, UNSAID | heads | stated, where)
    width = model.hidden_size // model.num_attention_heads
    if settings.get("head_dim") not in (None, width):
        raise UserError(f"{where}: head_dim is {str(settings['head_dim'])[:60]}, supported is {width}")
    return model


def _rope(settings: dict, where: str) -> dict:
    """The parameters of the rotary embedding, which transformers 4 had in two places."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters: expected a mapping, found {type(rope).__name__}")
    kind = str(rope.get("rope_type", rope.get("type", "default")))[:40]
    one_of("rope_type", kind, set(ROPES), where)
    rope = {"rope_theta": settings.get("rope_theta", 1e4)} | rope
    for key, value in (dict.fromkeys(ROPES[kind]) | rope).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in ("rope_type", "type") and (not is_number or value <= 0):
            raise UserError(f"{where}: rope_parameters.{key}: expected a number above 0, found {str(value)[:40]}")
    return rope


def require_weights(model: ModelConfig) -> None:
    """Raise `UserError` unless the checkpoint of a model has just its tensors, in their shapes. A shard of the hub that
    is yet to be fetched is not looked at."""
    shards = shard_of_each_tensor(model.weights, model.revision)
    if missing := next((name for name, _ in tensors(model) if name not in shards), None):
        raise UserError(f"{model.weights}: the checkpoint has no tensor {missing!r}")
    expected = dict(tensors(model))
    tolerated = {"lm_head.weight"} if model.tie_word_embeddings else set()
    for name in shards:
        if name not in expected and name not in tolerated and not name.endswith(".rotary_emb.inv_freq"):
            raise UserError(
                f"{model.weights}: the checkpoint has a tensor {name[:80]!r}, expected none of this name in "
                f"{model.num_hidden_layers} layers of a {model.architecture}"
            )
    for shard in sorted(set(shards.values())):
        path = file_at_hand(model.weights, shard, model.revision)
        if path is not None:
            _require_tensors(path, {name: expected.get(name) for name, place in shards.items() if place == shard})


def _require_tensors(path: Path, expected: dict[str, tuple[int, ...] | None]) -> None:
    """Raise unless a shard has tensors of numbers, in the shapes where those are stated."""
    headers = read_header(path)
    for name, shape in expected.items():
        if name not in headers:
            raise UserError(f"{path}: no tensor {name!r}, though {INDEX} says so")
        kind, actual = headers[name]
        if shape is not None and actual != shape:
            raise UserError(f"{path}: {name} has shape {actual}, the model expects {shape}")
        if shape is not None and kind not in FLOATS:
            raise UserError(f"{path}: {name} is of {kind}, expected one of {', '.join(FLOATS)}")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of each tensor in a safetensors file; `UserError` where it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, expected a whole safetensors file ({str(error)[:120]})") from None


def shard_of_each_tensor(source: str, revision: str | None = None) -> dict[str, str]:
    """The file of each tensor of a checkpoint. Raises `UserError` where it has none, or names what is no file of it."""
    index = file_of(source, INDEX, revision)
    if index is None:
        single = file_of(source, SINGLE, revision)
        if single is None:
            pickled = next((name for name in PICKLED if (Path(source) / name).exists()), None)
            hint = f"found {pickled}, which is a pickle and never loaded" if pickled else "is it a checkpoint?"
            raise absent(source, f"no {INDEX} and no {SINGLE}", f", expected weights in safetensors; {hint}")
        return dict.fromkeys(read_header(single), SINGLE)
    shards = read_json(index, "list of shards").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: weight_map: expected the file of each tensor, found {str(shards)[:40]}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not is_inside(shard):
            raise UserError(
                f"{index}: weight_map.{name[:80]}: expected a file of the model's folder, found {str(shard)[:80]!r}"
            )
    return shards


def tensors(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that a checkpoint of a model must have, with their shapes."""
    hidden = model.hidden_size
    yield "model.embed_tokens.weight", (model.vocab_size, hidden)
    for layer in range(model.num_hidden_layers):
        for linear, (inputs, outputs) in model.linears.items():
            attention = linear in ("q_proj", "k_proj", "v_proj", "o_proj")
            name = f"model.layers.{layer}.{'self_attn' if attention else 'mlp'}.{linear}"
            yield f"{name}.weight", (outputs, inputs)
            if model.architecture == "qwen2" and attention and linear != "o_proj":
                yield f"{name}.bias", (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not model.tie_word_embeddings:
        yield "lm_head.weight", (model.vocab_size, hidden)


def identity(model: ModelConfig) -> dict:
    """What a model is, wherever its folder lies: its dimensions, and of its weights a hash of their headers and of
    pieces of them, or the commit of the hub's repository."""
    return model.model_dump(mode="json", exclude={"weights", "revision"}) | {"weights": _fingerprint(model)}


def _fingerprint(model: ModelConfig) -> str:
    if model.weights == "random":
        return model.weights
    if not Path(model.weights).is_dir():
        at_hand = file_of(model.weights, CONFIG, model.revision)
        return f"{model.weights}@{at_hand.parent.name if at_hand else model.revision}"
    digest = hashlib.sha256()
    for shard in sorted(set(shard_of_each_tensor(model.weights).values())):
        path = Path(model.weights) / shard
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for place in range(0, size, max(size // SAMPLES, SAMPLE)):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
