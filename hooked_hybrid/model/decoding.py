"""`Decoder`: the rows of one `generate` call, from prefill to the finished texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooked_hybrid.hooks.run import Stage
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.recorder import Recorder
from hooked_hybrid.model.sampling import NoChoiceError, Sampling
from hooked_hybrid.model.step_graph import StepGraph, capture_steps
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.state import HybridState

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

_PROMPT_END = 16  # last tokens of the prompt that new tokens are decoded with


@dataclass(frozen=True)
class GenerationOutput:
    """The result of `generate` with `return_type="output"`.

    `tokens` are prompt and new tokens, with rows padded on the left; `new_tokens` are the new ones,
    padded on the right after a row has finished. `text` is the text that each row's new tokens add
    to the prompt, without end-of-sequence and up to a stop string; None without a tokenizer.
    `logprobs` are the log-probabilities of the new tokens under the model, in nats, 0 after the
    end; `margins` are the differences of the two largest logits at each choice, infinite after the
    end. `state` is the state after all tokens that were read; each row's last new token was not
    read. `cache` is the cache of one forward over prompt and new tokens, with the effects of the
    hooks; positions that a finished row did not read are zero (scores: the lowest finite value).
    `finished` is True for rows that ended before the limit.

    Examples:
        >>> out = model.generate(text, 3, return_type="output", names_filter=True, verbose=False)
        >>> out.text, out.new_tokens.shape
        (['Dolores Park .'], torch.Size([1, 3]))
        >>> out.cache["pattern", 2].shape  # of the 18 tokens that were read
        torch.Size([1, 8, 18, 18])
    """

    tokens: Int[Tensor, "batch pos"]
    new_tokens: Int[Tensor, "batch new"]
    text: list[str] | None
    logprobs: Float[Tensor, "batch new"]
    margins: Float[Tensor, "batch new"]
    state: HybridState
    cache: ActivationCache | None
    finished: Bool[Tensor, " batch"]


class Decoder:
    """The rows of one `generate` call; finished rows are dropped from later forwards."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"] | None,
        state: HybridState | None,
        sampling: Sampling,
        eos: Sequence[int],
        stop_strings: list[str],
    ) -> None:
        self.model, self.tokens, self.mask, self.state = model, tokens, mask, state
        self.sampling, self.draws, self.stop_strings = sampling, sampling.draws(), stop_strings
        self.eos = torch.tensor(list(eos), device=tokens.device, dtype=torch.long)
        self.pad = next(iter(eos), 0)
        self.has_ends = bool(eos or stop_strings)
        self.batch = tokens.shape[0]
        self.rows = torch.arange(self.batch, device=tokens.device)
        self.step = 0
        self.graph: StepGraph | None = None  # holds the state while it runs the steps
        self.logits: Tensor | None = None
        self.new: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.margins: list[Tensor] = []
        self.finished = torch.zeros(self.batch, dtype=torch.bool, device=tokens.device)
        self.ended: list[tuple[Tensor, HybridState]] = []
        self.prompt_ends: dict[int, list[int]] = {}

    def prefill(self, last_token_too: bool) -> None:
        """Read the prompt, all of it or all but its last token."""
        n_pos = self.tokens.shape[1] - (0 if last_token_too else 1)
        if n_pos:
            mask = None if self.mask is None else self.mask[:, :n_pos]
            self._read(self.tokens[:, :n_pos], mask, "prefill", wants_logits=last_token_too)

    def decode(self, max_new_tokens: int, bar: Any) -> None:
        """Choose a token, read it, and so on, until all rows have ended."""
        if self.logits is None:
            self._read(self.tokens[:, -1:], None, "generation")
        for i in range(max_new_tokens):
            chosen = self._choose()
            bar.update()
            if i + 1 == max_new_tokens or not self.rows.numel():
                break
            self._read(chosen, None, "generation", n_steps=max_new_tokens - 1 - i)

    def _read(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        stage: Stage,
        wants_logits: bool = True,
        n_steps: int = 0,
    ) -> None:
        """Read tokens; at most `n_steps` steps follow, this one included."""
        self.step += stage == "generation"
        self._enter_or_leave_graph(n_steps)
        if self.graph is not None:
            self.logits = self.graph.step(tokens)
            return
        layout = lay_out(
            tokens,
            self.state,
            mask,
            None,
            stage,
            self.step,
            self.rows,
            allow_empty_rows=True,
            n_rows=self.batch,
        )
        is_logits_hooked = self.model.unembed.hook_logits.is_hooked
        read_out = (is_logits_hooked, *(p.is_hooked for p in self.model.ln_final.children()))
        logits, self.state = self.model.run_layout(
            tokens,
            layout,
            self.state,
            return_type="logits" if wants_logits or any(read_out) else None,
            logits_to_keep=None if is_logits_hooked else 1,
        )
        self.logits = logits[:, -1] if wants_logits else None

    def _enter_or_leave_graph(self, n_steps: int) -> None:
        """Move the state into a graph that can run the next steps, or back out of it."""
        if self.graph is not None and not self.graph.is_valid:
            self.state, self.graph = self.graph.state(), None
        if self.graph is None and self.state is not None and self.step > 1:
            self.graph = capture_steps(self.model, self.state, n_steps)
            self.state = self.state if self.graph is None else None

    def _state_now(self) -> HybridState:
        """Return the state of the unfinished rows."""
        state = self.state if self.graph is None else self.graph.state()
        assert state is not None
        return state

    def _choose(self) -> Tensor:
        """Append a token to every unfinished row; return the tokens of rows that continue."""
        assert self.logits is not None
        uniform = None
        if self.draws is not None:
            uniform = self.draws.at(len(self.new), self.batch, self.rows.device)[self.rows]
        try:
            chosen, logprobs, margins = self.sampling.choose(self.logits, uniform)
        except NoChoiceError as error:
            rows = self.rows[error.rows].tolist()
            raise ValueError(
                f"new token {len(self.new)} of row{'s' * (len(rows) > 1)} "
                f"{', '.join(map(str, rows))} (step {self.step}): the logits are NaN or infinite, "
                "so no token can be chosen. A hook made them so, or a value overflowed the dtype"
            ) from error
        self.new.append(self._in_all_rows(chosen, self.pad))
        self.logprobs.append(self._in_all_rows(logprobs, 0.0))
        self.margins.append(self._in_all_rows(margins, torch.inf))
        if not self.has_ends:
            return chosen[:, None]
        ends = torch.isin(chosen, self.eos) | self._meets_stop_string()
        if not bool(ends.any()):
            return chosen[:, None]
        self.finished[self.rows[ends]] = True
        state = self._state_now()
        self.ended.append((self.rows[ends], state[ends]))
        self.rows = self.rows[~ends]
        if self.graph is None:
            self.state = state[~ends]
        else:
            self.graph.keep(~ends)
        return chosen[~ends][:, None]

    def _in_all_rows(
        self, x: Shaped[Tensor, " going_on"], fill: int | float
    ) -> Shaped[Tensor, " batch"]:
        """Return a value for all rows, with `fill` in finished rows."""
        if len(self.rows) == self.batch:
            return x
        return x.new_full((self.batch,), fill).index_copy(0, self.rows, x)

    def _meets_stop_string(self) -> Tensor:
        if not self.stop_strings:
            return torch.zeros_like(self.rows, dtype=torch.bool)
        text, rows = self.model.text, self.rows.tolist()
        new = torch.stack(self.new, dim=1)[self.rows].tolist()
        read = [text.decode_after(self._prompt_end(r), n) for r, n in zip(rows, new, strict=True)]
        return torch.tensor(
            [any(s in t for s in self.stop_strings) for t in read], device=self.rows.device
        )

    def _prompt_end(self, row: int) -> list[int]:
        """Return the last tokens of a row's prompt, enough to decode new ones after them."""
        if row not in self.prompt_ends:
            n = self.tokens.shape[1] if self.mask is None else int(self.mask[row].sum())
            ids = self.tokens[row, self.tokens.shape[1] - n :].tolist()
            decode, size = self.model.text.decode, _PROMPT_END
            while size < n and not decode(ids[-size:], skip_special_tokens=True):
                size *= 2
            self.prompt_ends[row] = ids[-size:]
        return self.prompt_ends[row]

    def result(
        self, return_type: str, is_single: bool, recorder: Recorder | None
    ) -> GenerationOutput | Tensor | str | list[str]:
        """Return the result in the form of `return_type`."""
        new = torch.stack(self.new, dim=1)
        tokens = torch.cat([self.tokens, new], dim=1)
        if return_type == "tokens":
            return tokens
        texts = None if self.model.tokenizer is None else self._texts(new)
        if return_type == "str":
            whole = [self._whole_text(row, new[row]) for row in range(self.batch)]
            return whole[0] if is_single else whole
        return GenerationOutput(
            tokens=tokens,
            new_tokens=new,
            text=texts,
            logprobs=torch.stack(self.logprobs, dim=1),
            margins=torch.stack(self.margins, dim=1),
            state=self._final_state(),
            cache=None if recorder is None else recorder.cache(),
            finished=self.finished,
        )

    def _final_state(self) -> HybridState:
        state = self._state_now()
        if not self.ended:
            return state
        parts = [*self.ended, (self.rows, state)]
        rows = torch.cat([rows for rows, _ in parts])
        return HybridState.cat([state for _, state in parts])[rows.argsort()]

    def _texts(self, new: Tensor) -> list[str]:
        """Return each row's new text, up to EOS or a stop string."""
        read = self.model.text.added
        rows = enumerate(map(self._before_eos, new))
        return [read(self._prompt_end(row), ids, self.stop_strings) for row, ids in rows]

    def _before_eos(self, new: Tensor) -> list[int]:
        is_end = torch.isin(new, self.eos).int()
        return new[: int(is_end.argmax()) if bool(is_end.any()) else None].tolist()

    def _whole_text(self, row: int, new: Tensor) -> str:
        """Return prompt and new text, decoded together, up to a stop string in the new text."""
        prompt = self.tokens[row] if self.mask is None else self.tokens[row][self.mask[row] > 0]
        ids, text = prompt.tolist(), self.model.text
        added = text.decode_after(ids, self._before_eos(new), skip_special_tokens=True)
        return text.decode(ids, skip_special_tokens=True) + self._before_stop(added)

    def _before_stop(self, text: str) -> str:
        cuts = [text.find(s) for s in self.stop_strings if s in text]
        return text[: min(cuts)] if cuts else text
