"""What may be wrong with a file: of any kind, of text, and of the kinds that the program reads.

Each function returns mutations by their names: bytes, or what puts something else in the place of a file.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

SEED = 25
DEEP = 5_000
HUGE = 10**30

Mutations = dict[str, bytes | Callable[[Path], None]]


def draw(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")


def no_file() -> Mutations:
    """Something that is no file in the place of one."""
    return {
        "missing": lambda path: None,
        "a-folder": Path.mkdir,
        "a-folder-with-files": _full_folder,
        "a-pipe": os.mkfifo,
        "a-socket": _socket,
        "a-link-to-itself": lambda path: path.symlink_to(path.name),
        "a-link-to-nothing": lambda path: path.symlink_to("nothing"),
        "a-link-to-zeros": lambda path: path.symlink_to("/dev/zero"),
        "a-link-to-a-process": lambda path: path.symlink_to("/proc/self/mem"),
        "unreadable": _unreadable,
    }


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("x")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _unreadable(path: Path) -> None:
    path.write_text("x")
    path.chmod(0)


def any_text(valid: bytes, seed: int = SEED) -> Mutations:
    """Text of any kind, damaged."""
    dice = draw(seed, "text")
    middle = len(valid) // 2
    flipped = bytearray(valid)
    for _ in range(20):
        flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
    return {
        "empty": b"",
        "blank": b" \n\t\n",
        "nul": b"\0" * 64,
        "nul-within": valid[:middle] + b"\0" + valid[middle:],
        "binary": dice.randbytes(4096),
        "gzip": gzip.compress(valid, mtime=0),
        "utf-16": valid.decode().encode("utf-16"),
        "utf-32": valid.decode().encode("utf-32"),
        "latin-1": valid[:middle] + "é".encode("latin-1") + valid[middle:],
        "overlong-utf-8": valid[:middle] + b"\xc0\xaf" + valid[middle:],
        "surrogate-bytes": valid[:middle] + b"\xed\xa0\x80" + valid[middle:],
        "html": b"<!doctype html><html><head><title>404 Not Found</title></head></html>\n",
        "flipped": bytes(flipped),
        "a-word": b"word",
        "a-number": b"17",
        "a-long-line": b"x" * 3_000_000,
    }


def yaml_text(valid: bytes, seed: int = SEED) -> Mutations:
    """A YAML mapping, damaged."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    return any_text(valid, seed) | {
        "cut": valid[: len(valid) * 2 // 3] + b"\n  [",
        "a-list": b"- a\n- b\n",
        "null": b"null\n",
        "a-date": b"2001-01-01\n",
        "only-a-comment": b"# nothing\n",
        "two-documents": valid + b"---\n" + valid,
        "tabs": valid + b"x:\n\t- y\n",
        "a-key-twice": valid + valid,
        "unknown-key": valid + b"torture: 1\n",
        "a-number-as-key": valid + b"1: 2\n",
        "null-as-key": valid + b"~: 2\n",
        "a-list-as-key": valid + b"? [a, b]\n: c\n",
        "a-mapping-as-key": valid + b"? {a: b}\n: c\n",
        "a-long-key": valid + b"k" * 100_000 + b": 1\n",
        "merge-of-a-word": valid + b"<<: word\n",
        "a-tag": valid + b"x: !unknown {a: b}\n",
        "a-python-tag": valid + b"x: !!python/object/apply:os.system ['touch PWNED']\n",
        "a-python-name": valid + b"x: !!python/name:os.system\n",
        "bad-alias": valid + b"x: *nowhere\n",
        "bad-anchor": valid + b"x: &a *a\n",
        "a-circle": valid + b"x: &x [*x]\n",
        "aliases-that-blow-up": valid + bomb.encode(),
        "deep-lists": valid + b"x: " + b"[" * DEEP + b"]" * DEEP + b"\n",
        "deep-mappings": valid + b"x: " + b"{a: " * DEEP + b"1" + b"}" * DEEP + b"\n",
        "deep-blocks": valid + b"x:\n" + b"".join(b" " * n + b"a:\n" for n in range(1, 2000)),
        "a-long-integer": valid + b"x: " + b"9" * 5000 + b"\n",
        "a-bad-date": valid + b"x: 2001-99-99\n",
        "a-bad-sexagesimal": valid + b"x: 190:20:30:99:99\n",
        "bad-base64": valid + b"x: !!binary '?'\n",
        "bad-number": valid + b"x: !!int word\n",
        "bad-float": valid + b"x: !!float word\n",
        "bad-set": valid + b"x: !!set [a]\n",
        "escape": valid + b'x: "\\uD800"\n',
        "terminal-codes": valid + b'"\\e[31mred\\e[0m\\a": 1\n',
        "bad-quote": valid + b"x: 'open\n",
        "bad-directive": b"%TAG ! !\n%YAML 9.9\n---\n" + valid,
    }


def json_text(valid: bytes, seed: int = SEED) -> Mutations:
    """A JSON object, damaged."""
    start = valid.rstrip().removesuffix(b"}") + b", "
    text = any_text(valid, seed)
    for name in ("utf-16", "utf-32"):
        text.pop(name)  # JSON may be written so
    return text | {
        "cut": valid[: len(valid) * 2 // 3],
        "without-the-last-brace": valid.rstrip()[:-1],
        "with-more": valid + b"{}",
        "a-list": b"[]",
        "list-of-itself": b"[" + valid + b"]",
        "an-empty-object": b"{}",
        "null": b"null",
        "true": b"true",
        "a-string": b'"x"',
        "unknown-key": start + b'"torture": 1}',
        "a-long-key": start + b'"' + b"k" * 100_000 + b'": 1}',
        "a-key-twice": start + b'"x": 1, "x": 2}',
        "nan": start + b'"x": NaN}',
        "infinity": start + b'"x": -Infinity}',
        "1e999": start + b'"x": 1e999}',
        "a-long-integer": start + b'"x": ' + b"9" * 5000 + b"}",
        "deep-lists": start + b'"x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        "deep-objects": start + b'"x": ' + b'{"a": ' * DEEP + b"1" + b"}" * DEEP + b"}",
        "deep-and-open": b"[" * 100_000,
        "a-lone-surrogate": start + b'"x": "\\ud800"}',
        "a-surrogate-key": start + b'"\\udfff": 1}',
        "terminal-codes": start + b'"\\u001b[31mred\\u0007": 1}',
        "a-comment": valid + b"\n// comment\n",
        "single-quotes": valid.replace(b'"', b"'"),
    }


def json_values(valid: dict, skipped: tuple[str, ...] = ()) -> Mutations:
    """Each key of a JSON object, at the top, without it and with values of wrong types."""
    wrong = {
        "null": None, "a-word": "word", "negative": -1, "huge": HUGE, "half": 0.5, "true": True, "list": [[]],
        "object": {"x": {}},
    }  # fmt: skip
    made: Mutations = {}
    for key in valid.keys() - set(skipped):
        made[f"without-{key}"] = json.dumps({name: value for name, value in valid.items() if name != key}).encode()
        for name, value in wrong.items():
            made[f"{key}-{name}"] = json.dumps(valid | {key: value}).encode()
    return dict(sorted(made.items()))


def buckets(plan: dict) -> Mutations:
    """A plan with graphs whose one bucket is not what its microbatches need."""
    (bucket,) = plan["buckets"]
    others = {name: [json.loads(content)] for name, content in json_values(bucket).items()}
    others |= {"none": [], "twice": [bucket, bucket], "smaller": [bucket | {"tokens": 15}],
               "fewer-samples": [bucket | {"samples": 1}], "a-shorter-sample": [bucket | {"longest": 1}]}  # fmt: skip
    return {name: json.dumps(plan | {"buckets": value}).encode() for name, value in others.items()}


def csv_text(valid: bytes, seed: int = SEED) -> Mutations:
    """A CSV with a header, damaged."""
    header, _, rows = valid.partition(b"\n")
    names = header.split(b",")
    return any_text(valid, seed) | {
        "cut": valid[: len(valid) * 2 // 3],
        "only-a-header": header + b"\n",
        "no-header": rows,
        "other-columns": b"a,b\n1,2\n",
        "a-column-twice": b",".join([*names, names[0]]) + b"\n" + rows,
        "a-column-less": b",".join(names[:-1]) + b"\n" + rows,
        "short-rows": header + b"\n1,2\n",
        "long-rows": header + b"\n" + b",".join([b"1"] * (len(names) + 5)) + b"\n",
        "words-as-numbers": header + b"\n" + b",".join([b"word"] * len(names)) + b"\n",
        "nan-everywhere": header + b"\n" + b",".join([b"nan"] * len(names)) + b"\n",
        "an-open-quote": header + b'\n"open\n' + rows,
        "a-long-field": header + b"\n" + b"x" * 1_000_000 + b"," * (len(names) - 1) + b"\n",
        "semicolons": valid.replace(b",", b";"),
    }


def binary(valid: bytes, seed: int = SEED) -> Mutations:
    """A binary file, damaged."""
    dice = draw(seed, "binary")
    flipped = bytearray(valid)
    flipped[dice.randrange(10, 64)] ^= 0xFF  # behind what gzip does not look at
    return {
        "empty": b"",
        "a-byte": valid[:1],
        "cut-in-the-head": valid[:20],
        "cut-in-half": valid[: len(valid) // 2],
        "cut-at-the-end": valid[:-1],
        "longer": valid + b"x",
        "flipped": bytes(flipped),
        "zeros": bytes(len(valid)),
        "random": dice.randbytes(len(valid)),
        "text": b"this is text\n",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    }


def safetensors(valid: bytes, seed: int = SEED) -> Mutations:
    """A file of tensors whose header lies."""
    size = struct.unpack("<Q", valid[:8])[0]
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    first = next(name for name in header if name != "__metadata__")

    def with_header(changed: object) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    def with_entry(**changes: object) -> bytes:
        return with_header(header | {first: header[first] | changes})

    return binary(valid, seed) | {
        "a-huge-header": struct.pack("<Q", 2**60) + valid[8:],
        "a-header-of-nothing": struct.pack("<Q", 0) + valid[8:],
        "a-header-that-is-a-list": with_header([]),
        "a-header-that-is-empty": with_header({}),
        "a-header-nested": with_header(b"[" * DEEP + b"]" * DEEP),
        "a-header-of-words": with_header({first: "word"}),
        "an-offset-beyond": with_entry(data_offsets=[0, 2**50]),
        "offsets-that-cross": with_entry(data_offsets=[8, 0]),
        "a-dtype-of-nothing": with_entry(dtype="F17"),
        "a-shape-of-words": with_entry(shape=["a"]),
        "a-negative-shape": with_entry(shape=[-1, -1]),
        "another-shape": with_entry(shape=[1]),
        "without-a-tensor": with_header({name: entry for name, entry in header.items() if name != first}),
    }


def stores() -> Mutations:
    """Stores of results with other lines than they should have."""
    lines: dict[str, bytes] = {
        "no-lines": b"",
        "a-number": b"17\n",
        "only-a-head": b'{"table": "t.csv", "sha256": "0"}\n',
        "a-list": b"[]\n[]\n",
        "other-keys": b'{"a": 1}\n',
        "heads-of-numbers": b'{"table": 1, "sha256": 2}\n{"result": 3, "content": 4}\n',
        "deep": b"[" * DEEP,
        "a-surrogate": b'{"table": "\\ud800", "sha256": "0"}\n{"result": "\\ud800", "content": {}}\n',
        "binary": bytes(range(256)),
        "a-bomb": b" " * 300_000_000,
    }
    return {f"of-{name}": gzip.compress(text, compresslevel=1, mtime=0) for name, text in lines.items()}


def rows(valid: bytes) -> Mutations:
    """JSONL with a row that is none, or that has no use."""
    bad = {
        "a-list": b"[1, 2]", "a-number": b"17", "null": b"null", "not-closed": b'{"q": "x"',
        "nan": b'{"q": NaN, "a": 1}',
        "infinity": b'{"q": Infinity, "a": 1}', "1e999": b'{"q": 1e999, "a": 1}', "no-fields": b"{}",
        "other-fields": b'{"x": 1}', "null-prompt": b'{"q": null, "a": "x"}',
        "a-key-twice": b'{"q": 1, "q": 2, "a": 3}', "a-lone-surrogate": b'{"q": "\\ud800", "a": "x"}',
        "a-surrogate-within": b'{"q": [["\\udfff"]], "a": "x"}',
        "deep-lists": b'{"q": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        "a-long-integer": b'{"q": ' + b"9" * 5000 + b', "a": 1}',
        "messages": b'{"q": [{"role": "user", "content": "x"}], "a": "x"}', "two-objects": b'{"q": 1, "a": 2}{"q": 1}',
        "latin-1": b'{"q": "\xe9", "a": "x"}', "terminal-codes": b'{"q\\u001b[31m": 1}',
        "many-fields": b"{" + b", ".join(b'"key-%d": 1' % n for n in range(20_000)) + b"}",
    }  # fmt: skip
    made: Mutations = {f"row-{name}": valid + row + b"\n" for name, row in bad.items()}
    return made | {
        "only-blank-completions": b'{"q": "x", "a": " "}\n' * 5,
        "only-null-completions": b'{"q": "x", "a": null}\n' * 5,
        "a-json-list": b'[{"q": "x", "a": "y"}]\n',
        "a-csv": b"q,a\nx,y\n",
        "a-parquet": b"PAR1" + bytes(64) + b"PAR1",
    }


def model_values(valid: dict) -> Mutations:
    """A model's configuration with a value that no model has."""
    changes: dict[str, dict] = {
        "no-heads": {"num_attention_heads": 0}, "negative-heads": {"num_attention_heads": -4},
        "heads-that-do-not-divide": {"num_attention_heads": 5}, "no-key-heads": {"num_key_value_heads": 0},
        "key-heads-that-do-not-divide": {"num_key_value_heads": 3}, "no-layers": {"num_hidden_layers": 0},
        "a-billion-layers": {"num_hidden_layers": 10**9}, "layers-without-end": {"num_hidden_layers": HUGE},
        "no-width": {"hidden_size": 0}, "a-word-as-width": {"hidden_size": "word"},
        "an-odd-width": {"hidden_size": 33}, "width-without-end": {"hidden_size": HUGE},
        "width-of-null": {"hidden_size": None}, "no-words": {"vocab_size": 0}, "negative-words": {"vocab_size": -1},
        "architecture-unknown": {"model_type": "torture"}, "architecture-of-pictures": {"model_type": "vit"},
        "architecture-a-list": {"model_type": ["llama"]}, "rope-unknown": {"rope_parameters": {"rope_type": "spiral"}},
        "rope-a-list": {"rope_parameters": [1]}, "rope-of-words": {"rope_parameters": {"rope_theta": "word"}},
        "rope-null": {"rope_parameters": {"rope_type": None}}, "an-unknown-activation": {"hidden_act": "torture"},
        "quantization-unknown": {"quantization_config": {"quant_method": "torture"}},
        "quantization-a-word": {"quantization_config": "word"}, "head_dim-zero": {"head_dim": 0},
        "layer_types-words": {"layer_types": ["a", "b"]}, "an-epsilon-of-words": {"rms_norm_eps": "word"},
        "torch_dtype-word": {"torch_dtype": "word", "dtype": "word"},
    }  # fmt: skip
    made: Mutations = {name: json.dumps(valid | change).encode() for name, change in changes.items()}
    own_code = {"model_type": "torture", "auto_map": {"AutoConfig": "torture.TortureConfig"}}
    return made | {"code-of-its-own": json.dumps(valid | own_code).encode()}


def tokenizer_settings(valid: dict) -> Mutations:
    """A tokenizer_config.json with values of wrong types."""
    keys = ("tokenizer_class", "bos_token", "model_max_length", "additional_special_tokens", "added_tokens_decoder")
    wrong = {"a-list": [[]], "a-mapping": {"x": 1}}
    made = {f"{key}-{name}": valid | {key: value} for key in keys for name, value in wrong.items()}
    del made["additional_special_tokens-a-mapping"]  # names of its own
    return {name: json.dumps(content).encode() for name, content in made.items()}


def indexes(valid: dict) -> Mutations:
    """A list of shards that leads nowhere, or out of the folder."""
    tensors = dict(valid["weight_map"])
    first = next(iter(tensors))
    shards: dict[str, object] = {
        "outside": "../rows.jsonl", "absolute": "/etc/passwd", "a-device": "/dev/zero", "missing": "none.safetensors",
        "a-number": 17, "null": None, "a-list": ["model.safetensors"], "nothing": "", "the-folder": ".",
        "a-nul": "a\0b", "too-long": "x" * 300,
    }  # fmt: skip
    made: Mutations = {
        f"a-shard-{name}": json.dumps({"weight_map": tensors | {first: shard}}).encode()
        for name, shard in shards.items()
    }
    return made | {
        "no-map": b'{"metadata": {}}',
        "an-empty-map": b'{"weight_map": {}}',
        "a-map-of-words": b'{"weight_map": "word"}',
        "a-tensor-missing": json.dumps({"weight_map": {k: v for k, v in tensors.items() if k != first}}).encode(),
    }


def adapter_values(valid: dict) -> Mutations:
    """An adapter's configuration with a value that no adapter has."""
    changes: dict[str, dict] = {
        "no-rank": {"r": 0}, "a-negative-rank": {"r": -1}, "a-rank-of-words": {"r": "word"},
        "rank-without-end": {"r": HUGE},
        "an-unknown-kind": {"peft_type": "TORTURE"}, "another-kind": {"peft_type": "PREFIX_TUNING"},
        "no-base": {"base_model_name_or_path": None}, "base-nowhere": {"base_model_name_or_path": "/nowhere/at/all"},
        "base-a-number": {"base_model_name_or_path": 17}, "base-on-the-hub": {"base_model_name_or_path": "a/b"},
        "no-such-linears": {"target_modules": ["torture"]}, "linears-a-number": {"target_modules": 17},
        "a-bad-pattern": {"target_modules": "(["}, "an-unknown-bias": {"bias": "torture"},
        "an-unknown-task": {"task_type": "TORTURE"},
    }  # fmt: skip
    return {name: json.dumps(valid | change).encode() for name, change in changes.items()}


def tokenizer_values(valid: dict) -> Mutations:
    """A tokenizer with a part that is missing or is none."""
    changes: dict[str, dict] = {
        "a-negative-id": {"model": valid["model"] | {"vocab": {"a": -1}}},
        "an-id-without-end": {"added_tokens": [{"id": HUGE, "content": "x"}]},
        "an-unknown-model": {"model": valid["model"] | {"type": "torture"}},
        "an-unknown-version": {"version": 17}, "no-normalizer-at-all": {"normalizer": {}},
        "merges-of-nothing": {"model": {"type": "BPE", "vocab": {"a": 5}, "merges": [["a", "zz"]]}},
        "no-token-for-a-word": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
        "a-bad-pattern": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated",
                                            "invert": False}},
    }  # fmt: skip
    changes |= {f"{key}-{name}": {key: value} for key in ("added_tokens", "model", "decoder", "post_processor")
                for name, value in (("a-number", 17), ("an-object", {}))}  # fmt: skip
    return {name: json.dumps(valid | change).encode() for name, change in changes.items()}
