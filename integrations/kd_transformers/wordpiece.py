"""A WordPiece tokenizer made from a training set, for networks that start from nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Scripts of many thousand characters would leave no room for words.
_LETTERS = 1000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096, max_length: int = 512) -> BertTokenizer:
    """Trains a lower-casing WordPiece tokenizer with BERT's special tokens and template.

    Schuster and Nakajima, "Japanese and Korean Voice Search", ICASSP 2012; the texts alone decide the vocabulary, so
    the same texts give the same tokenizer.

    Args:
        texts: The training split; nothing else, or the vocabulary knows what it should not.
        vocab_size: Size of the vocabulary, at most.
        max_length: What the tokenizer says its model reads.
    """
    tokenizer, texts = BertWordPieceTokenizer(), list(texts)
    counts = Counter(char for text in texts for char in tokenizer.normalize(text) if not char.isspace())
    letters = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:_LETTERS])
    tokenizer.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        min_frequency=2,
        # Ties between merges go by token number, and letters within words get theirs in the order of a hash map, which
        # changes from run to run, unless they are there from the start.
        special_tokens=[*_SPECIAL, *letters, *(f"##{char}" for char in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    return BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=max_length)
