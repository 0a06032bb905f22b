"""circuitsvis shows our attention patterns."""

from __future__ import annotations

import json
import re

import circuitsvis
import pytest
import torch

from hooked_hybrid import HookedHybrid


@pytest.mark.parametrize("name", ["tiny-griffin", "tiny-jamba"])
@pytest.mark.parametrize("element", ["attention_patterns", "attention_heads"])
def test_patterns_are_rendered(name, element):
    model = HookedHybrid.from_pretrained(name)
    text = "The best thing to do in Dover is read a book."
    _, cache = model.run_with_cache(text)
    layer = model.cfg.attention_layers[-1]
    tokens, pattern = model.to_str_tokens(text), cache["pattern", layer][0]
    html = getattr(circuitsvis.attention, element)(tokens=tokens, attention=pattern)
    shown = json.loads(re.search(r"^ *(\{\".*\}) *$", str(html), re.MULTILINE)[1])
    assert shown["tokens"] == tokens
    assert torch.allclose(torch.tensor(shown["attention"]), pattern, atol=1e-6)
    assert "CircuitsVis.render" in html.local_src  # what a notebook without a network shows


def test_logits_of_each_token_are_rendered():
    model = HookedHybrid.from_pretrained("tiny-griffin")
    text = "The best thing to do in Dover is read a book."
    _, cache = model.run_with_cache(text)
    tokens = model.to_str_tokens(text)
    norms = cache["ssm_state", 0][0].norm(dim=-1)
    html = str(circuitsvis.tokens.colored_tokens(tokens, norms))
    assert all(json.dumps(token) in html for token in tokens)
