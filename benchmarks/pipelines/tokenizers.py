"""Tokenizers with a vocabulary of single characters, built in memory."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

CLIP_VOCAB_SIZE = 514
T5_VOCAB_SIZE = 200
GEMMA_VOCAB_SIZE = 120
QWEN_VOCAB_SIZE = 262
ROBERTA_VOCAB_SIZE = 261
_CLIP_MAX_TOKENS = 77
_T5_MAX_TOKENS = 64
_T5_SENTINELS = 100
_QWEN_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}\n{% endfor %}"
)


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges; its last two ids are start and end of text."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    assert len(vocab) == CLIP_VOCAB_SIZE
    return CLIPTokenizer(
        vocab=vocab, merges=[], pad_token=pad_token, model_max_length=_CLIP_MAX_TOKENS
    )


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the printable ASCII characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -2.0) for piece in _ascii_pieces()]
    vocab += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(_T5_SENTINELS))]
    assert len(vocab) <= T5_VOCAB_SIZE
    return T5Tokenizer(vocab=vocab, extra_ids=_T5_SENTINELS, model_max_length=_T5_MAX_TOKENS)


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer whose pieces are the printable ASCII characters."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_ascii_pieces()]
    assert len(words) <= GEMMA_VOCAB_SIZE
    return GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level Qwen tokenizer without merges, with a chat template of one line a message."""
    return _qwen(Qwen2Tokenizer)


def _qwen(kind: type[Qwen2Tokenizer]) -> Qwen2Tokenizer:
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *_QWEN_MARKS]
    assert len(words) == QWEN_VOCAB_SIZE
    tokenizer = kind(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        extra_special_tokens=list(_QWEN_MARKS),
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def roberta_tokenizer(max_tokens: int) -> RobertaTokenizer:
    """A byte-level RoBERTa tokenizer without merges."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    assert len(words) == ROBERTA_VOCAB_SIZE
    vocab = {word: index for index, word in enumerate(words)}
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=max_tokens)


class _ChatProcessor(Qwen2Tokenizer):
    """Stands in for a processor, which needs torchvision: text only, and its own `tokenizer`."""

    @property
    def tokenizer(self) -> Qwen2Tokenizer:
        return self


def chat_processor() -> Qwen2Tokenizer:
    """A Qwen tokenizer that pipelines take for a processor of chats."""
    processor = _qwen(_ChatProcessor)
    processor.padding_side = "left"
    return processor


def _ascii_pieces() -> list[str]:
    return ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
