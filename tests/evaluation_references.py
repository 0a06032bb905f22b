"""What tests of evaluation share: a tokenizer of the local tasks' words, requests, responses."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast  # noqa: TID251

SPECIAL = {"recurrentgemma": ["<pad>", "<eos>", "<bos>"], "jamba": ["<pad>", "<bos>", "<eos>"]}
CHAT = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}
{{ raise_exception('no system') }}{% endif %} w{{ loop.index }} {{ m['content'] }} w9 {% endfor %}
{% if add_generation_prompt %}w8 {% endif %}"""


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words in the local tasks, which puts BOS in front."""
    letters = [*"ABCD", "A:", "B:", "C:", "D:", "Answer:", "<unk>"]
    words = [*SPECIAL[family], *letters, *(f"w{i}" for i in range(88))]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, **named)


class Asked:
    """What lm-eval hands to a model, as far as a model looks at it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def responses(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the model's answers to each task's requests."""
    return {
        task: [r[0] for sample in samples for r in sample["resps"]]
        for task, samples in found["samples"].items()
    }
