"""Small tokenizers of kinds that others train."""

from pathlib import Path

import sentencepiece


def sentencepiece_with_prefix(folder: Path) -> Path:
    """A model as Llama and Mistral use: a space before every text, NFKC off, byte fallback, </s>."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat then the hat sat"] * 50),
        model_prefix=str(folder / "prefix"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "prefix.model"
