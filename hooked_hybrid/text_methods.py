"""Text in and out of a model: TransformerLens's token methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.checks import refuse_text_options
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.options import check_choice
from hooked_hybrid.shapes import Tokens
from hooked_hybrid.text import PaddingSide, Text

Input = str | Sequence[str] | Sequence[int] | Tensor


class TextMethods:
    """What a model with a tokenizer can do with text. Mixed into `HookedHybrid`."""

    cfg: HybridConfig
    tokenizer: Any
    why_no_tokenizer: str | None

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...  # noqa: D102

        @property
        def W_U(self) -> Float[Tensor, "d_model d_vocab"]: ...  # noqa: D102

    @property
    def text(self) -> Text:
        """The tokenizer with this model's special tokens.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            why = f" ({self.why_no_tokenizer})" if self.why_no_tokenizer else ""
            raise ValueError(
                f"this model has no tokenizer{why}: pass tokens, or load it with tokenizer=..."
            )
        return Text(self.tokenizer, self.cfg)

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tokens:
        """Return the tokens of a text, or of several, padded on the right unless told.

        The mask of padded rows is not returned; passing the strings themselves to the model or to
        `generate` keeps it.
        """
        tokens, _ = self.encode_texts(input, prepend_bos, padding_side or "right")
        if truncate and self.cfg.n_ctx is not None:
            tokens = tokens[:, : self.cfg.n_ctx]
        return tokens.to(self.device) if move_to_device else tokens

    def to_string(self, tokens: Tensor | Sequence[int]) -> str | list[str]:
        """Return the text of a row of tokens, or the texts of several rows."""
        tokens = torch.as_tensor(tokens)
        if tokens.ndim == 2:
            return [self.text.decode(row) for row in tokens.tolist()]
        return self.text.decode(tokens.reshape(-1).tolist())

    def to_str_tokens(
        self, input: Input, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Return each token of a text, or of a row of tokens, as a string.

        Several texts give a list for each.

        Raises:
            ValueError: `prepend_bos=True` with tokens.
        """
        if is_texts(input):
            return [self._str_tokens(text, prepend_bos) for text in input]
        return self._str_tokens(input, prepend_bos)

    def _str_tokens(self, input: Any, prepend_bos: bool | None) -> list[str]:
        tokens = self._tokens_of(input, prepend_bos)
        return [self.text.decode([t]) for t in tokens.reshape(-1).tolist()]

    def _tokens_of(self, input: Any, prepend_bos: bool | None) -> Tensor:
        """Return the tokens of a text, or tokens as they are."""
        if isinstance(input, str):
            return self.to_tokens(input, prepend_bos)
        refuse_text_options(prepend_bos, None)
        return torch.as_tensor(input)

    def to_single_token(self, string: str) -> int:
        """Return the token that a string is.

        Raises:
            ValueError: it is several tokens, or none.
        """
        ids = self.text.encode(string, prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is {len(ids)} tokens, {ids}, not one")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """Return the string of one token."""
        return self.text.decode([token])

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Return where a token first (or last) stands in a text or a row of tokens.

        Raises:
            ValueError: it does not stand there, `mode` is neither, or `prepend_bos=True` with
                tokens.
        """
        check_choice("mode", mode, ("first", "last"))
        tokens = self._tokens_of(input, prepend_bos)
        token = (
            self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        )
        found = (tokens.reshape(-1) == token).nonzero()[:, 0].tolist()
        if not found:
            raise ValueError(f"token {token} ({single_token!r}) does not stand in the input")
        return int(found[0] if mode == "first" else found[-1])

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, ...]
    ) -> Float[Tensor, "... d_model"]:
        """Return the unembedding vector of each token: what raises its logit, before `ln_final`."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[torch.as_tensor(tokens, device=self.device)]

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> Tokens:
        """Return the tokens [1 pos] of a conversation, as the model was trained to read it.

        Args:
            messages: each with a "role" and a "content".
            add_generation_prompt: end with the opening of the model's turn.

        Raises:
            ValueError: no tokenizer, or a checkpoint without a chat template.
        """
        template = getattr(self.text.tokenizer, "apply_chat_template", None)
        if template is None:
            raise ValueError("this tokenizer has no chat template: load one that has")
        text = template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        return self.to_tokens(text, prepend_bos=False)

    def encode_texts(
        self,
        input: Any,
        prepend_bos: bool | None,
        padding_side: PaddingSide,
        continues: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the padded tokens of one or several texts, and their mask if any is padded.

        BOS is put in front as the model was trained, but not of a text that continues a state.
        """
        default = self.text.prepends_bos and not continues
        prepend = default if prepend_bos is None else prepend_bos
        texts = [input] if isinstance(input, str) else list(input)
        return self.text.batch(texts, prepend, padding_side)


def is_texts(input: Any) -> bool:
    """Whether an input is a list of texts."""
    return isinstance(input, (list, tuple)) and bool(input) and isinstance(input[0], str)
