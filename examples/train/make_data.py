"""Write the data and the tokenizer of jobs.yaml anew: `python examples/train/make_data.py`."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima",
    "Chile": "Santiago", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "Iran": "Tehran", "Ghana": "Accra",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "up": "down", "left": "right", "big": "small", "fast": "slow", "wet": "dry", "old": "new",
    "high": "low", "open": "closed", "full": "empty", "early": "late", "day": "night",
}  # fmt: skip


def write_rows(name: str, rows: list[dict]) -> None:
    (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_tokenizer() -> None:
    """A token for each byte, and two special tokens: 258 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(FOLDER / "tokenizer")


if __name__ == "__main__":
    write_rows("capitals", [{"country": country, "capital": city} for country, city in CAPITALS.items()])
    write_rows("opposites", [{"word": word, "opposite": other} for word, other in OPPOSITES.items()])
    write_rows("sums", [{"a": a, "b": b, "sum": a + b} for a in range(1, 5) for b in range(1, 5)])
    (FOLDER / "counting.txt").write_text("".join(f"{number} comes before {number + 1}.\n" for number in range(40)))
    save_tokenizer()
