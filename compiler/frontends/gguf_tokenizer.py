"""The tokenizer in a GGUF file's metadata as Hugging Face's tokenizer.json.

Two kinds: "gpt2" is byte-level BPE with its merges in the file; "llama" is SentencePiece's BPE, whose merges follow
from the scores of its vocabulary: a token may be made of any two tokens that spell it, better scores first. Tokens
marked "control" become special added tokens, those marked "user-defined" plain ones; both are matched whole before any
merge.
"""

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tilewright.compiler.checkpoint import TokenizerFiles
from tilewright.compiler.errors import ModelError
from tilewright.compiler.frontends.gguf_file import GGUFFile
from tilewright.compiler.frontends.stop_tokens import END_OF_TURN

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # tokenizer.ggml.token_type
_SPACE = "▁"  # how SentencePiece spells a space

# How the text is cut before merging, by tokenizer.ggml.pre: the expressions the vocabularies were trained with.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
}
_GPT2_LIKE = ("gpt-2", "gpt2", "default")
_DIGIT_WISE = ("smollm",)
# These take a whole word that is a token as it is, whatever the merges say.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_NORMALISED = ("qwen2", "deepseek-r1-qwen")


def read_tokenizer(file: GGUFFile) -> TokenizerFiles | None:
    """The tokenizer, chat template and stop tokens; None where the file has no vocabulary."""
    metadata = file.metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise ModelError(f"{file.path}: tokenizer {kind!r} is not supported; supported are {', '.join(_BUILDERS)}")
    _check_lengths(file)
    tokenizer = _BUILDERS[kind](file)
    _add_tokens(tokenizer, metadata)
    bos_by_default = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str(),
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_token=_special(file, "bos"),
        eos_token=_special(file, "eos"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)),
        stop_token_ids=_stop_token_ids(metadata),
    )


def _byte_level(file: GGUFFile) -> Tokenizer:
    """GPT-2's BPE over bytes, each spelled as a printable character."""
    metadata = file.metadata
    pre = metadata.get("tokenizer.ggml.pre", "default")
    known = (*_GPT2_LIKE, *_DIGIT_WISE, *_SPLITS)
    if pre not in known:
        raise ModelError(f"{file.path}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(known)}")
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ModelError(f"{file.path}: metadata tokenizer.ggml.merges is missing; convert the model again")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = _vocabulary(metadata["tokenizer.ggml.tokens"])
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _byte_level_split(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level_split(pre: str) -> Any:
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGIT_WISE:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words


def _sentence_piece(file: GGUFFile) -> Tokenizer:
    """SentencePiece's BPE over characters; what the vocabulary lacks is spelled in bytes (<0x0A>)."""
    metadata = file.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.scores" not in metadata:
        raise ModelError(f"{file.path}: metadata tokenizer.ggml.scores is missing; convert the model again")
    vocabulary = _vocabulary(tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocabulary,
        _merges(vocabulary, metadata),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges(vocabulary: dict[str, int], metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """Every pair of tokens that spells a third, best score first. Whole-matched and byte tokens take no part."""
    scores, types = metadata["tokenizer.ggml.scores"], metadata.get("tokenizer.ggml.token_type")
    apart = (_CONTROL, _USER_DEFINED, _BYTE)
    ids = {token: i for token, i in vocabulary.items() if types is None or types[i] not in apart}
    ranked = sorted((-scores[i], ids[left], ids[right], left, right) for left, right, i in _pairs(ids))
    return [(left, right) for *_, left, right in ranked]


def _pairs(ids: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                yield left, right, i


_BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece}


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Token -> id; of equal spellings the first counts."""
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocabulary.setdefault(token, i)
    return vocabulary


def _check_lengths(file: GGUFFile) -> None:
    """Raises ModelError where the vocabulary's arrays differ in length, or a special id lies outside."""
    count = len(file.metadata["tokenizer.ggml.tokens"])
    for name in ("scores", "token_type"):
        values = file.metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and len(values) != count:
            raise ModelError(f"{file.path}: {len(values)} token {name} for {count} tokens; convert the model again")
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
        if not 0 <= token < max(count, 1):
            raise ModelError(f"{file.path}: {name}_token_id is {token}, but there are {count} tokens")


def _add_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return
    typed = list(zip(metadata["tokenizer.ggml.tokens"], types.tolist(), strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in typed if k == _USER_DEFINED])


def _special(file: GGUFFile, name: str) -> str | None:
    token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if token is None else file.metadata["tokenizer.ggml.tokens"][token]


def _stop_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """End of sequence, of turn, of message, as the file names them, and the control tokens known to end a turn."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = {metadata[key] for key in keys if key in metadata}
    types = metadata.get("tokenizer.ggml.token_type")
    tokens = metadata["tokenizer.ggml.tokens"]
    known = {i for i, t in enumerate(tokens) if t in END_OF_TURN and types is not None and types[i] == _CONTROL}
    return tuple(sorted(named | known))
