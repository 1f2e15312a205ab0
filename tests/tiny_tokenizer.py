"""A tokenizer small enough to be made by each test that needs one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 256, 257  # <s> and </s>, after the 256 bytes


def save_tokenizer(folder: Path, around: str = "<s> $A", bos: str = "<s>", eos: str | None = "</s>") -> Path:
    """A tokenizer with a token for each byte, in a folder as AutoTokenizer reads it; returns the folder.

    around: what it puts before and after a text, as a template of the tokenizers library.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>")])
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    # A tokenizer.json may ask for truncation. The rule of the samples is the one that counts.
    tokenizer.enable_truncation(4)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(folder)
    return folder
