"""`TextModel`: conversion of text and tokens, with TransformerLens's methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks import transforms
from hooked_hybrid.model.checks import refuse_text_options
from hooked_hybrid.network.network import Network
from hooked_hybrid.options import check_choice
from hooked_hybrid.shapes import Tokens
from hooked_hybrid.text.padding import mask_of, may_hold_padding
from hooked_hybrid.text.text import PaddingSide, Text, as_tokenizer, pad_rows

Input = str | Sequence[str] | Sequence[int] | Tensor
Rows = Int[Tensor, "batch pos"] | Sequence[Sequence[int]]


class TextModel(Network):
    """A network with a tokenizer, which converts text to tokens and back.

    Args:
        cfg: what the model is.
        tokenizer: a Hugging Face tokenizer, or a folder with one; None for a model that accepts
            tokens only.
        device, dtype: of the parameters.
    """

    tokenizer: Any

    def __init__(
        self,
        cfg: HybridConfig,
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(cfg, device=device, dtype=dtype)
        self.tokenizer = as_tokenizer(tokenizer)

    @property
    def text(self) -> Text:
        """The tokenizer with this model's special tokens.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: pass tokens, or load it with tokenizer=..."
            )
        return Text(self.tokenizer, self.cfg)

    @overload
    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        return_mask: Literal[False] = False,
    ) -> Tokens: ...

    @overload
    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        *,
        return_mask: Literal[True],
    ) -> tuple[Tokens, Tokens]: ...

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        return_mask: bool = False,
    ) -> Tokens | tuple[Tokens, Tokens]:
        """Return the tokens of a text, or of several, padded on the right by default.

        Args:
            input: a text or several.
            prepend_bos: None: the tokenizer's own BOS and EOS; True: always with BOS in front;
                False: only the text's tokens. A text that begins with BOS gets no second one
                (transformers would add it).
            padding_side: "left" or "right".
            move_to_device: to the model's device; else they are on the CPU.
            truncate: cut each text to `cfg.n_ctx` tokens before padding, on the tokenizer's
                `truncation_side`, by default the right; BOS and EOS are kept.
            return_mask: return (tokens, mask) with the mask [batch pos], 1 at tokens and 0 at
                padding, for the `attention_mask` of the model and of `generate`.

        Raises:
            ValueError: texts without a token; or padded ones without a mask, if padding could not
                be distinguished from text, as there is no padding token or it is also BOS or EOS.

        Examples:
            >>> model.to_tokens("a sandwich").tolist()
            [[2, 32, 105]]
            >>> model.to_tokens(["a sandwich", "Dolores Park ."]).shape
            torch.Size([2, 4])
        """
        tokens, mask = self._encoded(input, prepend_bos, padding_side or "right", cut=truncate)
        if not return_mask and not self.text.shows_padding and not bool(mask.all()):
            raise ValueError(
                "these texts differ in length, and the tokenizer has no padding token, or one that "
                "is BOS or EOS too, so that their padding would be read as text: take the mask, "
                "tokens, mask = model.to_tokens(..., return_mask=True), or pass the texts"
            )
        device = self.device if move_to_device else torch.device("cpu")
        return (tokens.to(device), mask.to(device)) if return_mask else tokens.to(device)

    def get_attention_mask(self, tokens: Rows) -> Int[Tensor, "batch pos"]:
        """Return the mask that the model uses for tokens without one: 1, and 0 at padding.

        Padding is the padding tokens at the beginning or end of a row. All tokens count as text if
        the model has no tokenizer, the tokenizer has no padding token, or rows have one token.

        Raises:
            ValueError: padding that cannot be distinguished from text.

        Examples:
            >>> model.get_attention_mask(model.to_tokens(["sandwich", "Dolores Park"])).tolist()
            [[1, 1, 0], [1, 1, 1]]
        """
        checked, mask = check_batch(self, tokens, None)
        return torch.ones_like(checked) if mask is None else mask

    def padding_mask(self, tokens: Rows) -> Bool[Tensor, "batch pos"]:
        """Return True at padding, as the model recognises it in tokens without a mask.

        The opposite of `get_attention_mask`, which is the mask that `attention_mask=` takes.

        Raises:
            ValueError: padding that cannot be distinguished from text.

        Examples:
            >>> model.padding_mask(model.to_tokens(["sandwich", "Dolores Park"])).tolist()
            [[False, False, True], [False, False, False]]
        """
        return self.get_attention_mask(tokens) == 0

    def to_string(self, tokens: Tensor | Sequence[int]) -> str | list[str]:
        """Return the text of a row of tokens, or the texts of several rows.

        Examples:
            >>> model.to_string(tokens[0, 1:4])
            'eat a sandwich'
        """
        tokens = torch.as_tensor(tokens)
        if tokens.ndim == 2:
            return [self.text.decode(row) for row in tokens.tolist()]
        return self.text.decode(tokens.reshape(-1).tolist())

    def to_str_tokens(
        self, input: Input, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Return each token of a text, or of a row of tokens, as a string.

        Each token is decoded as within a text: a blank before it is kept, also at the beginning of
            a text. If tokens share a character, the last one has it, and those before it are
            U+FFFD. Several texts give a list each.

        Raises:
            ValueError: `prepend_bos=True` with tokens.

        Examples:
            >>> model.to_str_tokens("eat a sandwich")
            ['<bos>', 'eat', 'a', 'sandwich']
        """
        if is_texts(input):
            return [self._str_tokens(text, prepend_bos) for text in input]
        return self._str_tokens(input, prepend_bos)

    def _str_tokens(self, input: Any, prepend_bos: bool | None) -> list[str]:
        return self.text.strings(self._row(input, prepend_bos).tolist())

    def _row(self, input: Any, prepend_bos: bool | None) -> Int[Tensor, " pos"]:
        """Return one row of tokens, from a text or from tokens."""
        if isinstance(input, str):
            return self.to_tokens(input, prepend_bos)[0]
        refuse_text_options(prepend_bos, None)
        tokens = torch.as_tensor(input)
        if tokens.ndim > 1 and tokens.shape[0] != 1:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give one row of them")
        return tokens.reshape(-1)

    def to_single_token(self, string: str) -> int:
        """Return the id of a string that is a single token.

        Raises:
            ValueError: it is several tokens, or none.

        Examples:
            >>> model.to_single_str_token(model.to_single_token("Dolores"))
            'Dolores'
        """
        ids = self.text.encode(string, prepend_bos=False)
        if len(ids) != 1:
            shown = f"{len(ids)} tokens, {ids}"
            raise ValueError(f"{string!r} is {shown}, {self.text.strings(ids)}, not one")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """Return the string of one token, with a blank before it kept.

        Examples:
            >>> model.to_single_str_token(logits[0, -1].argmax().item())
            'Dolores'
        """
        return self.text.strings([int_token])[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Return the first (or last) position of a token in a text or a row of tokens.

        Raises:
            ValueError: the token is not there, `mode` is neither, or `prepend_bos=True` with
                tokens.

        Examples:
            >>> model.get_token_position("Dolores", text)
            7
        """
        check_choice("mode", mode, ("first", "last"))
        tokens = self._row(input, prepend_bos)
        token = (
            self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        )
        found = (tokens == token).nonzero()[:, 0].tolist()
        if not found:
            raise ValueError(f"token {token} ({single_token!r}) is not in the input")
        return int(found[0] if mode == "first" else found[-1])

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, ...]
    ) -> Float[Tensor, "... d_model"]:
        """Return the unembedding vector of each token, the direction that raises its logit.

        Examples:
            >>> torch.equal(model.tokens_to_residual_directions("Dolores"), model.W_U[:, answer])
            True
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[torch.as_tensor(tokens, device=self.device)]

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> Tokens:
        """Return the tokens [1 pos] of a conversation, as the model was trained to read it.

        Nothing is cut at `cfg.n_ctx`, as that would lose the question to answer. Nothing is added
        to the template's text, so there is no second BOS.

        Args:
            messages: each with a "role" and a "content".
            add_generation_prompt: end with the opening of the model's turn.

        Raises:
            ValueError: no tokenizer, a checkpoint without a chat template or one that refuses the
                conversation, no message, several conversations, or a message without a role.

        Examples:
            >>> from pathlib import Path
            >>> model.save_pretrained("chatty")
            >>> n = Path("chatty/chat_template.jinja").write_text("{{ messages[0].content }} !")
            >>> chatty = HookedHybrid.from_pretrained("chatty")
            >>> chatty.to_string(chatty.apply_chat_template([{"role": "user", "content": "eat ?"}]))
            ['eat ? !']
        """
        template = getattr(self.text.tokenizer, "apply_chat_template", None)
        if template is None:
            raise ValueError("this tokenizer has no chat template: load one with a template")
        from hooked_hybrid.text.chat import check_conversation  # imports `jinja2`

        said = check_conversation(messages)
        text = template(said, add_generation_prompt=add_generation_prompt, tokenize=False)
        return self.to_tokens(text, prepend_bos=False, truncate=False)

    def encode_texts(
        self,
        input: Any,
        prepend_bos: bool | None,
        padding_side: PaddingSide,
        continues: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the padded tokens of one or several texts, and their mask if any is padded.

        A text that continues a state gets no BOS by default, and none of the tokenizer's other
        special tokens.

        Raises:
            ValueError: a text of more than `cfg.n_ctx` tokens.
        """
        prepend = False if continues and prepend_bos is None else prepend_bos
        tokens, mask = self._encoded(input, prepend, padding_side, cut=False)
        n_ctx = self.cfg.n_ctx
        if n_ctx is not None and tokens.shape[1] > n_ctx:
            long = (mask.sum(1) > n_ctx).nonzero()[:, 0].tolist()
            raise ValueError(
                f"texts {long} are longer than the model's n_ctx={n_ctx} tokens, the longest has "
                f"{tokens.shape[1]}: to_tokens(...) cuts them, to_tokens(..., truncate=False) "
                "gives all of them"
            )
        return tokens, None if bool(mask.all()) else mask

    def _encoded(
        self, input: Any, prepend_bos: bool | None, padding_side: PaddingSide, cut: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the padded tokens of texts and their mask, on the CPU."""
        texts = [input] if isinstance(input, str) else list(input)
        if wrong := [type(t).__name__ for t in texts if not isinstance(t, str)]:
            raise ValueError(f"the input holds a {wrong[0]} where texts belong: give texts alone")
        text = self.text
        rows = text.rows(texts, prepend_bos, self.cfg.n_ctx if cut else None)
        return pad_rows(rows, text.pad, padding_side)


def is_texts(input: Any) -> bool:
    """Whether an input is a list whose first entry is a text."""
    return isinstance(input, (list, tuple)) and bool(input) and isinstance(input[0], str)


def check_tokens(model: TextModel, tokens: Any) -> Tensor:
    """Return token ids [batch pos] on the model's device, without looking for padding.

    Raises:
        ValueError: not integers, not one or two axes, empty, or outside the vocabulary.
    """
    return _checked(model, tokens, knows_padding=True)[0]


def check_batch(
    model: TextModel,
    tokens: Any,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return token ids [batch pos] on the model's device and their mask.

    Without a mask and segments, if the model's tokenizer has a padding token, rows that begin or
    end with it are padded there; see `padding.mask_of`.

    Raises:
        ValueError: as `check_tokens`, and padding that cannot be distinguished from text.
    """
    given = attention_mask is not None or segment_ids is not None
    checked, is_padded = _checked(model, tokens, knows_padding=given)
    return checked, mask_of(checked, model.text) if is_padded else attention_mask


def _checked(model: TextModel, tokens: Any, knows_padding: bool) -> tuple[Tensor, bool]:
    """Return token ids on the model's device, and whether rows seem to be padded."""
    if isinstance(tokens, list | tuple) and any(isinstance(entry, str) for entry in tokens):
        raise ValueError("the input holds texts and others: give texts, or tokens [batch pos]")
    try:
        if not isinstance(tokens, Tensor):  # torch's default device would move it
            tokens = torch.as_tensor(tokens, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the input is a {type(tokens).__name__}; give tokens [batch pos], or text"
        ) from error
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, not {tokens.dtype}")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give [batch pos] or [pos]")
    rows = transforms.plain_rows(tokens)
    found = list(torch.aminmax(rows))
    if not knows_padding and model.tokenizer is not None:
        padded = may_hold_padding(rows, model.text)
        found += [] if padded is None else [padded.to(rows.dtype)]
    low, high, *is_padded = torch.stack(found).tolist()  # the host waits once
    if low < 0 or high >= model.cfg.d_vocab:
        raise ValueError(
            f"token ids from {low} to {high}; this model has 0 to {model.cfg.d_vocab - 1}"
        )
    return tokens.to(model.device, torch.long), any(is_padded)
