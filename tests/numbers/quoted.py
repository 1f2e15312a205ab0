"""What ties the numbers of a document to data: passages made from tables, and the kinds of numbers that need none.

A passage is text of the document in which each number is a value that was computed from a table, printed as the
document prints it, and marked by `number`. A document is right if it has each passage once, and if every number that is
in none is of a kind of `KINDS`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

OPEN, CLOSE = "\ue000", "\ue001"  # around a number that came from data
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}")
# A digit begins a number; letters before it make it a name, as in H200 or float64.
NUMBER = re.compile(r"(?<![\w.~])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
SOFTWARE = "FlashAttention|Python|torch|CUDA|Triton|megatron-core|transformers|PEFT|arXiv|Snakemake|Liger|pandas"
# What can be counted without being measured: parts of a setting, of a plan, of a machine.
THINGS = (
    "adapters?|arms?|bits|bytes|cells|cards?|columns|cores|factors|figures|gates|GPUs?|H200s?|H100s?(?:-80GB)?|hosts?|jobs|layers|"
    "lines|linears|machines?|models|nodes|points|processes|programs|ranks?|ratios|repeats|replicas|rows|"
    "samples|seeds|shapes|shares|stages?|steps|systems|warps|workloads|executions|global batches|random cases|rounds|"
    "multiprocessors"
)
SIZE = r"(?:1024|2048|2304|4096|5120|6144|8192|14336|27648|28672|16,384|32,768|65,536)"
SHAPE = rf"(?:{SIZE}|1024)(?:, {SIZE})*(?: → {SIZE}| × {SIZE}|²)?"

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"

# Numbers that are no measurements. Each pattern matches them with the words that make them so.
KINDS = {
    "a version": rf"(?:{SOFTWARE})[- ](?:[a-z0-9]+ )?v?\d+(?:\.\d+)*(?:(?:, | or | and )\d+(?:\.\d+)+)*",
    "a width in bits": r"\b(?:8|16|32|64)-bit\b|\brows of whole 16 bytes\b",
    "a commit": r"(?:commits?|at|traffic) [0-9a-f]{7}",
    "the name of a model": r"\b(?:Llama-|Qwen)[\w.-]+|\b\d+B\b",
    "a schedule's name": r"\b1F1B\b",
    "a setting": (
        r"(?:[Rr]anks?|dropout|[Dd]ropout of|alpha|seed|global batch(?:es)?(?: of)?|batch|p =|"
        r"[Rr]anks? \d+ to|β =|status(?: is)?) \d+(?:\.\d+)?(?:(?:,| to| and| or) \d+(?:\.\d+)?)*"
    ),
    "a size": (
        rf"{SHAPE}(?:(?:,| and| or) {SHAPE})*(?! *tokens a second)(?: tokens| columns| rows)?(?=[ .,;:)|*]|$)(?! a "
        rf"second)"
    ),
    "a count of things": (
        r"(?<![\d,.])(?!0)\d{1,4}(?:(?:,| and| or| to) \d{1,4})* (?:more |real |equal |fresh |other )?"
        rf"(?:{THINGS})\b"
    ),
    "an interval's confidence, a percentile": r"95 % interval|\b\d+th(?: to \d+th)? percentile",
    "a unit's part, a repeat": r"for 1000(?: real)? tokens|repeats \d and \d\b",
    "the name of a license, a conference or a device": r"\bApache-2\.0|\b[A-Z]\w+'\d\d\b|\b[A-Z]+\d+-\d+GB\b",
    "the name of an algorithm, a field's place": r"\bSHA-256\b|\bfield \d+ of\b",
    "a date": rf"(?:\d{{1,2}} )?(?:{MONTHS}) 20\d\d\b",
    "an issue, a year of a commit": r"issue \d+|\b[0-9a-f]{7}, 20\d\d\b",
    "a tensor's shape": r"\[1, T, [A-Z]\]",
    "a list's number": r"(?<=[.:;,?] )\d\. (?=[*A-Z`])",
    "a formula": r"(?:\d \(?S\b|S − \d|\bB − \d|j\+1|i \+ \d|⌈T / C⌉|2 \(7 h \+ 2 i\) \+ \(6 h \+ i\) / 8|\d \(\d h)",
}
KIND = re.compile("|".join(f"(?:{pattern})" for pattern in KINDS.values()))
# What a reader does not see as text, or sees as code: blocks and comments, then code and targets of links in a line.
BLOCK = re.compile(r"^ *```.*?^ *```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
# A table of keys with their defaults, or of words with their definitions, in the second column.
DEFAULTS = re.compile(r"^\|[^|\n]*\| (?:default|definition) \|.*\n(?:\|.*\n)+", re.MULTILINE)
CODE = re.compile(r"`[^`]+`|(?<=\])\([^)\s]+\)|https?://\S+")


class Untied(NamedTuple):
    """A number that comes from no table and is of no kind, with the text around it."""

    number: str
    context: str


def number(value: object, form: str = "") -> str:
    """A value from data as a document prints it."""
    return f"{OPEN}{value:{form}}{CLOSE}"


def percent(share: float, form: str = ".0f") -> str:
    return f"{number(100 * share, form)} %"


def plain(passage: str) -> str:
    return passage.replace(OPEN, "").replace(CLOSE, "")


def one_line(text: str) -> str:
    """The text with each break of a line or a table's row as one space."""
    return " ".join(text.split())


def missing(document: str, passages: list[str]) -> list[str]:
    """The passages that a document does not have exactly once."""
    text = one_line(BLOCK.sub(" ", document))
    return [plain(one) for one in map(one_line, passages) if text.count(plain(one)) != 1]


def untied(document: str, passages: list[str]) -> list[Untied]:
    """The numbers of a document that are in none of the passages and of no kind."""
    text = one_line(DEFAULTS.sub(_without_defaults, BLOCK.sub(" ", document)))
    for passage in map(one_line, passages):
        text = text.replace(plain(passage), MARKED.sub(_hidden, passage), 1)
    text = KIND.sub(_hidden, CODE.sub("`code`", text))
    return [Untied(match[0], text[max(0, match.start() - 50) : match.end() + 40]) for match in NUMBER.finditer(text)]


def _without_defaults(table: re.Match) -> str:
    hidden = re.compile(r"^(\|[^|]*\|)([^|]*)(?=\|)", re.MULTILINE)
    return hidden.sub(lambda row: row[1] + re.sub(r"\d", "#", row[2]), table[0])


def _hidden(match: re.Match) -> str:
    return re.sub(r"\d", "#", match[match.lastindex or 0])
