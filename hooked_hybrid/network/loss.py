"""Next-token loss with padding and document boundaries."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from hooked_hybrid.network.layout import Layout
from hooked_hybrid.shapes import Logits, Tokens


def next_token_loss(
    logits: Logits, tokens: Tokens, layout: Layout, per_token: bool = False
) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
    """Return the cross-entropy, in nats, of each token given those before it.

    Args:
        logits: of every position.
        tokens: the input.
        layout: gives padding and first tokens of documents, which are not predicted.
        per_token: return the loss of every token, 0 where none is predicted, instead of the mean.

    Raises:
        ValueError: fewer than two positions, or logits of only some of them.
    """
    if tokens.shape[1] < 2 or logits.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"logits for {logits.shape[1]} of {tokens.shape[1]} positions: a loss needs two tokens "
            "or more, and the logits of all"
        )
    wide = logits[:, :-1].float() if logits.dtype.itemsize < 4 else logits[:, :-1]
    is_predicted = layout.is_real[:, :-1] & (layout.pos[:, 1:] > 0)
    if not layout.is_plain:  # values at padding are not read, and their gradient is not NaN
        wide = wide.masked_fill(~is_predicted[..., None], 0)
    loss = cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = loss.view_as(is_predicted) * is_predicted
    return loss if per_token else loss.sum() / is_predicted.sum().clamp_min(1)
