"""A tokenizer small enough to be made by each test that needs one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


CORPUS = ["The river runs past seven mills and one old bridge.", "Question: how many cats? Answer: four cats, {}.",
          "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642 f(x) = [1, 2]\n\n\n\n\n"] * 20  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def save_trained(folder: Path, kind: str, around: str = "<s> $A") -> Path:
    """A tokenizer with words of some letters, in which a border between two texts may lie, and a chat template.

    kind: `bytes`, as GPT-2's and Llama 3's, or `blanks`, as SentencePiece's: it puts a blank before a text.
    """
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        blank = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(blank)
        letters = [chr(code) for code in range(32, 127)]
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=520, special_tokens=special + bytes_, initial_alphabet=letters, show_progress=False
        )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder
