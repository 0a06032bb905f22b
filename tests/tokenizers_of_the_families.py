"""Small tokenizers of every kind the supported families bring, and texts that are awkward."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (  # noqa: TID251
    GemmaTokenizerFast,
    LlamaTokenizerFast,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "The old man can see the river and the sea; a cat sat on the mat by the river.",
    "Rivers run to the sea. The best thing to do in Zürich is to eat a sandwich!",
    'def f(x):\n\treturn x + 1  # "two"  blanks, 12345 numbers',
    "Ein Baum im Garten, größer als ein Haus. Une élève naïve. Mañana será otro día.",
    "السلام عليكم ورحمة الله",
    "שלום עולם, מה שלומך?",
    "今日はいい天気です。河を見る。",
]
"""What the tokenizers are trained on: in emoji and other scripts they fall back to bytes."""
PIECES = ["The", "river", " river", "sea", "12", "3", "é", "e\u0301", "ß", " ", "  ", "   ", "\n"]
PIECES += [
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u200b",
    "▁",
    "😀",
    "👩‍👩‍👧",
    "🇨🇭",
    "שלום",
    "السلام",
]
PIECES += ["\u202e", "河", "。", "ﬁ", "\ufffd", "\x00", "\x7f", "<", ">", "<0x0A>", ".", "?!", "'s"]
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>", "<s>", "</s>", "<start_of_turn>", "<|end|>"]


def awkward_texts(n: int = 160) -> list[str]:
    """Return every piece alone, and drawn joins of a few, special tokens among them."""
    rng = random.Random(0)
    alone = [
        "",
        *PIECES,
        *SPECIAL,
        *(f"{a}{b}" for a, b in itertools.product(SPECIAL, ["a", " a"])),
    ]
    joins = ["".join(rng.choices(PIECES + SPECIAL, k=rng.randint(2, 9))) for _ in range(n)]
    return [*alone, *CORPUS, *joins]


def sentencepiece_folder(folder: Path, kind: str, **settings: Any) -> Path:
    """Write a `tokenizer.model` as Gemma's or Llama's are, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus").write_text("\n".join(CORPUS * 20))
    shared: dict[str, Any] = {
        "input": str(folder / "corpus"),
        "model_prefix": str(folder / "tokenizer"),
        "model_type": "bpe",
        "vocab_size": 420,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    gemma = {
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
        "control_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>"],
        "user_defined_symbols": ["▁▁", "▁▁▁", "\n\n"],
    }
    llama = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    SentencePieceTrainer.train(**shared, **(gemma if kind == "gemma" else llama))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level_folder(folder: Path, **settings: Any) -> Path:
    """Write a `tokenizer.json` of byte-level BPE, with BOS in front, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>", "<bos>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CLASSES: dict[str, Any] = {
    "gemma": GemmaTokenizerFast,  # which since 5.0 is GemmaTokenizer, and so is Llama's
    "llama": LlamaTokenizerFast,
    "byte_level": PreTrainedTokenizerFast,
}
KINDS = ("gemma.model", "gemma.json", "llama.model", "llama.json", "byte_level.json")


def folder_of(parent: Path, kind: str, **settings: Any) -> Path:
    """Write a folder of one of `KINDS`; a `.json` of SentencePiece is one that transformers saved.

    What the settings say of BOS and EOS is then in the saved post-processor.
    """
    name, form = kind.split(".")
    if name == "byte_level":
        return byte_level_folder(parent / kind, **settings)
    folder = sentencepiece_folder(parent / f"{name}.model", name, **settings)
    if form == "json":
        CLASSES[name].from_pretrained(folder).save_pretrained(parent / kind)
    return parent / kind


def reference_of(folder: Path) -> Any:
    """Return transformers' tokenizer of a folder that `folder_of` wrote."""
    return CLASSES[folder.name.split(".")[0]].from_pretrained(folder)
