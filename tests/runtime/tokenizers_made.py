"""Small real tokenizers: byte-level BPE (GPT-2, Llama 3, Qwen) and BPE with byte fallback (Llama 2, Gemma)."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps",
    "naïve café — 中文字符 and 日本語 with emoji 🙂🙃 and flags 🇨🇭",
    "   leading spaces\n\n\tand tabs, ünïcödé übér alles",
]
EOS, SPECIAL = "<|end|>", "<|turn|>"


def _with_added_tokens(tokenizer: Tokenizer) -> str:
    tokenizer.add_special_tokens([EOS, SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("一 added")])
    return tokenizer.to_str()


@functools.cache
def byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return _with_added_tokens(tokenizer)


@functools.cache
def byte_fallback(strip: int = 1) -> str:
    """strip: how many spaces decoding takes off a text. 1: Llama 2, where encoding puts one there; 0: Gemma."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TEXT[:1] * 3, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"]))
    model = json.loads(trained.to_str())["model"]
    names = [*sorted(model["vocab"], key=model["vocab"].get), *(f"<0x{b:02X}>" for b in range(256))]
    names += ["▁▁", "�", "中"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(m) for m in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] * strip
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*chain, decoders.Strip(" ", strip, 0)] if strip else chain)
    return _with_added_tokens(tokenizer)
