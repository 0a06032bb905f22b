"""The word-level tokenizer of the packaged models, made with `tokenizers`."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing

from hooked_hybrid.niah.haystacks.words import SPECIAL, vocabulary

PAD, EOS, BOS, UNK = range(4)


def word_tokenizer() -> Tokenizer:
    """Return the tokenizer: a token for each word, mark or line break; blanks are not kept.

    With special tokens, a text begins with BOS.
    """
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(r"[^\S\n]+"), "removed"), Split(Regex(r"\n|[^\w\s]"), "isolated")]
    )
    tokenizer.add_special_tokens(SPECIAL)
    bos = SPECIAL[BOS]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return tokenizer
