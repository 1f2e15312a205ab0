"""Hostile values: each key of a jobs file and of a suite, with values that it cannot have."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.torture import valid
from tests.torture.case import Case

LONG = "x" * 100_000
NUMBER = ("[]", "{a: b}", "word", "-1", ".nan", ".inf", "yes", "1" + "0" * 30, f"'{LONG}'")
COUNT = (*NUMBER, "0", "0.5", "1e9999", "-1000000000", "2000000000000")
SHARE = (*NUMBER, "1.5", "0.9")
WORD = ("[]", "{a: b}", "17", "word", "''", "1e-1", LONG)
PATH = ("[]", "{a: b}", "17", "''", '"a\\0b"', "~nobody-at-all/x", LONG, '"\\uD800"')
BOOL = ("[]", "{a: b}", "word", "17", "0.5", "''")
LIST = ("{a: b}", "17", "word", "[]", "[[]]", "[17]", "[word]", "[a, a]")

FILE_KEYS = {
    "model": (*PATH, "nowhere", "/nowhere", "a/b/c", "http://x/y", "./model"),
    "revision": ("[]", "{a: b}", "17", "''"),
    "weights": WORD,
    "tokenizer": (*PATH, "nowhere", "/dev/null", "rows.jsonl"),
    "output": (*PATH, "jobs.yaml", "jobs.yaml/out", "/proc/out", "/dev/null", "/sys/out", ".", "rows.jsonl"),
    "device": (*WORD, "gpu", "cuda:0"),
    "dtype": (*WORD, "fp8", "int8"),
    "adapter_dtype": WORD,
    "processes": COUNT,
    "data_parallel": COUNT,
    "capacity": (*COUNT, "1"),
    "checkpointing": (*SHARE[:-1], "maybe"),
    "graphs": (*WORD, "yes"),
    "save_every": COUNT,
    "keep": COUNT,
    "stall_minutes": (*NUMBER, "0"),
    "wandb": (*WORD, "yes"),
    "wandb_project": ("[]", "{a: b}", "17", "''"),
    "seed": (*NUMBER, "0.5", "4294967296"),
    "defaults": ("[]", "17", "word", "{name: x}", "{torture: 1}", "{alpha: word}", "{dropout: 2}"),
    "jobs": (*LIST, "null", "[null]", "[{}]", "[{name: a}]", "[{data: {}}]"),
}
JOB_KEYS = {
    "name": (*PATH[:5], "a.b", "a/b", "..", "-x", "a b", "é", '"a\\nb"', '"\\e[31m"', LONG, "null", "training",
             "keys", "second", "SECOND"),
    "data": ("[]", "17", "word", "null", "{}", "{jsonl: rows.jsonl}", "{jsonl: []}", "{jsonl: 17, completion: '{a}'}",
             "{jsonl: nowhere, completion: '{a}'}", "{jsonl: /dev/zero, completion: '{a}'}",
             "{jsonl: ., completion: '{a}'}",
             "{jsonl: rows.jsonl, completion: ''}", "{jsonl: rows.jsonl, completion: 'x'}",
             "{jsonl: rows.jsonl, completion: '{'}", "{jsonl: rows.jsonl, completion: '}'}",
             "{jsonl: rows.jsonl, completion: '{}'}", "{jsonl: rows.jsonl, completion: '{a!r}'}",
             "{jsonl: rows.jsonl, completion: '{a:>1000000000}'}", "{jsonl: rows.jsonl, completion: '{a:{a:{a}}}'}",
             "{jsonl: rows.jsonl, completion: 17}", f"{{jsonl: rows.jsonl, completion: '{{a}}{LONG}', torture: 1}}",
             "{text: []}", "{text: nowhere}", "{text: rows.jsonl, block: 0}",
             "{text: rows.jsonl, block: 1000000000000}",
             "{text: rows.jsonl, jsonl: rows.jsonl}", "{hub: ''}", "{hub: 17, completion: '{a}'}", "{synthetic: 17}",
             "{synthetic: {samples: 0}}", "{synthetic: {samples: 1000000000}}",
             "{synthetic: {samples: 1000000000000000000000000000000}}", "{synthetic: {dataset: torture}}",
             "{synthetic: {scale: 0}}", "{synthetic: {scale: .nan}}", "{torture: 1}"),
    "shuffle": BOOL,
    "max_length": (*COUNT, "1"),
    "too_long": WORD,
    "learn_prompt": BOOL,
    "add_bos": BOOL,
    "add_eos": BOOL,
    "evaluation": (*SHARE, "{}", "{jsonl: nowhere, completion: '{a}'}", "{synthetic: {samples: 2}}"),
    "evaluate_every": (*COUNT, "1"),
    "rank": (*COUNT, "257", "1000000000"),
    "alpha": (*NUMBER, "0", "1e30"),
    "dropout": (*NUMBER, "1", "1.5"),
    "rslora": BOOL,
    "target_modules": (*LIST, "[q_proj, torture]", "[q_proj, 17]", "'(['"),
    "learning_rate": (*NUMBER, "0", "1e30", "5e", "2,0e-4"),
    "schedule": WORD,
    "warmup_steps": (*NUMBER, "0.5", "1000000000", "2000000000000"),
    "weight_decay": (*NUMBER, "1e30"),
    "max_grad_norm": (*NUMBER, "0", "1e30"),
    "global_batch_size": (*COUNT, "1000000000"),
    "epochs": (*COUNT, "1000000000"),
    "steps": (*COUNT, "2000000000"),
    "priority": tuple(value for value in NUMBER if value != "-1") + ("0.5", "1001"),
    "weight": (*NUMBER, "0", "1e30"),
    "seed": (*NUMBER, "0.5", "4294967296"),
}  # fmt: skip
SUITE_KEYS = {
    "name": (*PATH[:5], "a/b", "..", "/tmp/x", "-x", "a b", "reference", "paper", "x$(touch PWNED)", '"a\\nb"', LONG,
             "null"),
    "description": ("[]", "{a: b}", "17"),
    "device": WORD,
    "dtype": WORD,
    "adapter_dtype": WORD,
    "repeats": (*COUNT, "1000000000000"),
    "seed": (*NUMBER, "0.5", "4294967296"),
    "gpus_per_node": COUNT,
    "checks": ("[]", "17", "word", "{torture: 1}", "{lossless: []}", "{lossless: [word]}", "{lossless: [1x]}",
               "{lossless: [0x1]}", "{lossless: [1000000000x1]}", "{lossless: 1x1}", f"{{lossless: [{'9' * 5000}x1]}}"),
    "cost": BOOL,
    "profiled": (*LIST[:3], "[[]]", "[17]", "[word]"),
    "cells": (*LIST, "null", "[null]", "[{}]", "[{models: [tiny]}]"),
}  # fmt: skip
GRID_KEYS = {
    "models": (*LIST, "[../../models/tiny]", "[nowhere.yaml]"),
    "gpus": (*LIST[:5], "[0]", "[-1]", "[0.5]", "[1000000000]", "[1000000000000000000000000000000]", "[word]", "[5]",
             "[yes]"),
    "workloads": LIST,
    "systems": LIST,
    "data_parallel": (*COUNT, "3"),
    "samples": (*COUNT, "1000000000"),
    "global_batch": COUNT,
    "capacity": (*COUNT, "{xsum: word}", "{torture: 8}"),
    "length_scale": (*NUMBER, "0", "1e-30", "1e30"),
    "checkpointing": BOOL,
    "graphs": (*WORD, "on"),
    "merged_qkv": BOOL,
    "tuned": BOOL,
    "minutes": COUNT,
    "memory_gb": COUNT,
}  # fmt: skip
# Tried with these too: mistakes that only show together.
SEVERAL = {
    "every-key-wrong": b"".join(b"%s: {a: b}\n" % key.encode() for key in FILE_KEYS),
    "a-thousand-unknown-keys": valid.JOBS + b"".join(b"key-%d: 1\n" % number for number in range(1000)),
    "a-thousand-jobs-of-one-name": valid.JOBS + 1000 * b"  - {name: first, data: {synthetic: {}}}\n",
    "a-thousand-wrong-jobs": valid.JOBS + b"".join(b"  - {name: j%d, rank: x}\n" % number for number in range(1000)),
    "more-stages-than-layers": valid.JOBS + b"processes: 64\n",
    "evaluate-nothing": valid.JOBS + b"    evaluate_every: 1\n",
    "a-warm-up-without-end": valid.JOBS + b"    warmup_steps: 100\n",
    "steps-and-epochs-without-end": valid.JOBS.replace(
        b"    steps: 2\n", b"    epochs: 10001\n    steps: 1000000001\n"
    ),
}


def with_key(text: bytes, indent: str, key: str, value: str) -> bytes:
    """A YAML text with another value for the first key of that name and indent; the key is put first if it is new."""
    line = f"{indent}{key}: {value}\n".encode()
    marks = rf"{indent[:-2]}(?:  |- )" if indent else ""
    pattern = re.compile(
        rb"^%s%s:.*\n(?:(?:%s[ -].*)\n)*" % (marks.encode(), key.encode(), indent.encode() + b" *"), re.M
    )
    found = pattern.search(text)
    if found and not (indent and found[0].startswith(f"{indent[:-2]}- ".encode())):
        return text[: found.start()] + line + text[found.end() :]
    if found:  # the first key of an item of a list
        start = f"{indent[:-2]}- {key}: {value}\n".encode()
        first = found[0].partition(b"\n")[0] + b"\n"
        return text.replace(first, start, 1)
    if not indent:
        return text + line
    item = re.search(rb"^%s- .*\n" % indent[:-2].encode(), text, re.M)
    return text[: item.end()] + line + text[item.end() :]


def _named(values: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Values with short names for them."""
    for index, value in enumerate(values):
        yield f"{index}-{re.sub('[^A-Za-z0-9.-]+', '_', value[:24]).strip('_') or 'sign'}", value


def all_cases() -> Iterator[Case]:
    for keys, indent, text, name, words in (
        (FILE_KEYS, "", valid.JOBS, "jobs.yaml", "train"),
        (JOB_KEYS, "    ", valid.JOBS, "jobs.yaml", "train"),
        (SUITE_KEYS, "", valid.SUITE, "suite.yaml", "lab list"),
        (GRID_KEYS, "    ", valid.SUITE, "suite.yaml", "lab list"),
    ):
        kind = "job" if keys is JOB_KEYS else "block" if keys is GRID_KEYS else "file"
        for key, values in keys.items():
            for label, value in _named(values):
                changed = with_key(text, indent, key, value)
                files = valid.jobs_folder(changed) if words == "train" else {name: changed}
                yield Case(f"{words.replace(' ', '-')}/{kind}/{key}/{label}", words, (name,), files,
                           says=(name,), light=True)  # fmt: skip
    for label, text in SEVERAL.items():
        yield Case(f"train/several/{label}", "train", ("jobs.yaml",), valid.jobs_folder(text), says=("jobs.yaml",),
                   light=label != "a-warm-up-without-end")  # fmt: skip
