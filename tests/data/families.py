"""A small tokenizer of every kind that people use, trained in a moment, with the settings of the published ones."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hgrn2.data import HFTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, isn't it? Yes; 1234 times out of 56789.\n",
    "def f(x):\n    return x + 1  # one more\n\n\nprint(f(1))\n// a comment\n",
    "naïve café, Straße, 模型和语言。 Ελλάς 🙂 the end...\n\tTabs\tand  two  spaces   three\n",
    "rivers and a river; the rivers' names, a riverbank!!! (really)\r\n",
] * 4

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(pattern: str | None = None, prefix: bool = False, normalizer=None, added=(), ignore_merges=False):
    """GPT-2 and its successors: bytes, and words by a pattern."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    plain = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, plain]) if split else plain
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    if added:
        backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    return backend


def sentencepiece_bpe(scheme: str = "normalizer"):
    """Llama and Gemma: the whole text is one word, spaces are ▁, bytes stand for what is not in the vocabulary."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    # merges stay within words, as those of SentencePiece do
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|▁+|\n"), "isolated")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False, limit_alphabet=60)
    trained.train_from_iterator(CORPUS[:2] * 4, trainer)
    content = json.loads(trained.to_str())
    vocab = content["model"]["vocab"]
    # as in the published vocabularies, a line end is a byte
    newline = [token for token in vocab if "\n" in token]
    merges = [tuple(merge) for merge in content["model"]["merges"] if not any("\n" in part for part in merge)]
    for token in newline:
        token_id = vocab.pop(token)
        vocab[f"<unused{token_id}>"] = token_id
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    strip = [decoders.Strip(" ", 1, 0)]
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "gemma":
        backend.normalizer, strip = normalizers.Replace(" ", "▁"), []
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram(scheme: str = "always", normalizer=None):
    """T5 and XLM-R."""
    backend = Tokenizer(models.Unigram())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    backend.decoder = decoders.Metaspace("▁", scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def wordpiece():
    """BERT, uncased."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_level():
    """Words and what stands between them."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def t5_normalizer():
    """The part of T5's that is a setting: the rest is a table."""
    return normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Strip(left=False, right=True),
         normalizers.Replace(Regex(" {2,}"), "▁")]
    )  # fmt: skip


MAKERS = {
    "gpt2": byte_level,
    "gpt2-prefix": functools.partial(byte_level, prefix=True),
    "neox": lambda: byte_level(normalizer=normalizers.NFC(), added=["  ", "   ", "        ", "<think>"]),
    "cl100k": functools.partial(byte_level, CL100K),
    "o200k": functools.partial(byte_level, O200K),
    "llama3": functools.partial(byte_level, CL100K, ignore_merges=True),
    "qwen": lambda: byte_level(QWEN, normalizer=normalizers.NFC()),
    "llama": sentencepiece_bpe,
    "llama-first": functools.partial(sentencepiece_bpe, "first"),
    "llama-always": functools.partial(sentencepiece_bpe, "always"),
    "gemma": functools.partial(sentencepiece_bpe, "gemma"),
    "t5": lambda: unigram(normalizer=t5_normalizer()),
    "unigram": unigram,
    "unigram-first": functools.partial(unigram, "first"),
    "wordpiece": wordpiece,
    "wordlevel": word_level,
}


@functools.cache
def make(name: str) -> HFTokenizer:
    """The tokenizer of a family."""
    return HFTokenizer.from_json(MAKERS[name]().to_str(), name)
