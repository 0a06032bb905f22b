"""Prefill and decode: the same forward, over a state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.names import NameFilter
from hooked_hybrid.hooks.point import Stage
from hooked_hybrid.hooks.root import HookSpec
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.checks import checked_state, refuse_text_options
from hooked_hybrid.model.recorder import Recorder
from hooked_hybrid.model.sampling import NoChoiceError, Sampling
from hooked_hybrid.model.step_graph import StepGraph, captured
from hooked_hybrid.model.text_model import checked_batch, checked_tokens, is_texts
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.options import check_choice, check_count, refuse_ignored
from hooked_hybrid.text.padding import refuse_unequal_ends
from hooked_hybrid.text.text import PaddingSide

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

GenerationReturn = Literal["input", "str", "tokens", "output"]
_PROMPT_END = 16  # tokens of a prompt that new ones are read after


@dataclass(frozen=True)
class GenerationOutput:
    """What `generate` returns with `return_type="output"`.

    `tokens` are prompt and new tokens, rows padded on the left; `new_tokens` the new ones, padded
    on the right after a row has finished. `text` is what each row's new tokens add to the prompt's
    text, without end-of-sequence and up to a stop string, or None without a tokenizer. `logprobs`
    are those of the new tokens under the model, in nats, 0 after the end; `margins` are the
    differences of the two largest logits each was chosen from, infinite after the end. `state`
    stands after all that was read: each row's last new token was not. `cache` is what one forward
    over prompt and new tokens would have left, with the effects of the hooks; positions that a
    finished row did not read are zero (scores: the lowest finite value). `finished` says which
    rows met an end before the limit.
    """

    tokens: Int[Tensor, "batch pos"]
    new_tokens: Int[Tensor, "batch new"]
    text: list[str] | None
    logprobs: Float[Tensor, "batch new"]
    margins: Float[Tensor, "batch new"]
    state: HybridState
    cache: ActivationCache | None
    finished: Bool[Tensor, " batch"]


@torch.no_grad()
def generate(
    model: LanguageModel,
    input: Any,
    max_new_tokens: int = 10,
    *,
    fwd_hooks: Iterable[HookSpec] = (),
    prefill_hooks: Iterable[HookSpec] = (),
    generation_hooks: Iterable[HookSpec] = (),
    first_token_stage: Literal["prefill", "generation"] = "prefill",
    state: HybridState | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    names_filter: NameFilter | Literal[True] | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = (),
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    return_type: GenerationReturn = "input",
    verbose: bool = True,
) -> Any:
    """Continue prompts token by token, with hooks live in every forward.

    Args:
        model: runs the forwards.
        input: tokens [batch pos] or [pos], a text, or several.
        max_new_tokens: tokens added to each row at most.
        fwd_hooks: attached throughout.
        prefill_hooks, generation_hooks: attached after `fwd_hooks`, in one stage only. Those of a
            stage that this call does not have are an error, unless the other stage has them too.
        first_token_stage: which stage chooses the first new token. "prefill" reads the whole
            prompt in it (Hugging Face); "generation" leaves the last prompt token to a step of
            its own (Google's sampler), so that generation hooks act on the first new token too.
        state: what the prompts continue from; it is not changed.
        attention_mask: 1 at tokens, 0 at padding; rows padded on the right are moved to the right
            end, so that new tokens follow old ones. Where it is not given, padding is known as in
            the forward: padding tokens that a row begins or ends with.
        names_filter: what to keep of the activations, with `return_type="output"`: None for
            nothing, True for every point but the large ones, or a name, several, or a predicate.
        do_sample: draw tokens; else the most likely one is taken (TransformerLens draws unless
            told otherwise).
        temperature: of drawing, above 0; None is 1. As it goes to 0 the draw goes to the most
            likely token, also where it is too small to divide by. Without `do_sample` 0 may be
            given, which says the same.
        top_k, top_p: draw from so many of the most likely tokens; from the fewest most likely
            ones that hold this share of the probability.
        generator: gives the seed of the draws, on any device; None uses torch's global one. Row i's
            tokens depend on the seed, its number i and its own logits: not on the other rows, how
            many there are or when they end. A call takes one number from the generator.
        stop_at_eos: end a row at an end-of-sequence token.
        eos_token_id: instead of the model's own.
        stop_strings: end a row when its new text holds one of these; needs a tokenizer. The new
            text is read after the prompt's, so that a blank in front of its first word is there; a
            string that begins in the prompt does not count.
        prepend_bos, padding_side: for text; BOS is not added when continuing from a state.
        return_type: "tokens" (prompt and new), "str" (their text), "output"
            (`GenerationOutput`), or "input" for the kind that came in.
        verbose: show a progress bar.

    Returns:
        By `return_type`. A single text in gives a single text out.

    Raises:
        ValueError: options that do not go together or have no effect, or input that would be
            misread; later, logits that are NaN: the message names the row, the new token and the
            step, all from 0.
        HookNameError: a hook or filter that matches nothing; then nothing has run.
    """
    transforms.refuse("generate cannot run")
    check_count("max_new_tokens", max_new_tokens)
    check_choice("first_token_stage", first_token_stage, ("prefill", "generation"))
    check_choice("return_type", return_type, ("input", "str", "tokens", "output"))
    sampling = Sampling(do_sample, temperature, top_k, top_p, generator, model.cfg.d_vocab)
    if not stop_at_eos:
        refuse_ignored("leave out stop_at_eos=False to end rows at it", eos_token_id=eos_token_id)
    if return_type != "output":
        refuse_ignored("give return_type='output', which has the cache", names_filter=names_filter)
    stop_strings = _stop_strings(stop_strings)
    is_text = isinstance(input, str) or is_texts(input)
    if not is_text:
        refuse_text_options(prepend_bos, padding_side)
    if return_type == "input":
        return_type = "str" if is_text else "tokens"
    if return_type == "str" or stop_strings:
        _ = model.text  # raises without a tokenizer, before any work
    hooks = [tuple(h) for h in (fwd_hooks, prefill_hooks, generation_hooks)]
    fwd_hooks, prefill_hooks, generation_hooks = hooks
    model.check_hooks_to_add((*fwd_hooks, *prefill_hooks, *generation_hooks))

    tokens, mask = _prompt(model, input, is_text, attention_mask, state, prepend_bos, padding_side)
    checked_state(model, state, tokens.shape[0])
    _refuse_idle_hooks(tokens.shape[1], max_new_tokens, first_token_stage, *hooks[1:])
    recorder = None if names_filter is None else Recorder(model, names_filter, tokens, state)
    decoder = _Decoder(
        model, tokens, mask, state, sampling, _eos(model, stop_at_eos, eos_token_id), stop_strings
    )
    bar = tqdm(
        total=max_new_tokens, desc="generating", unit="tok", disable=not verbose, leave=False
    )
    with bar, model.hooks(fwd_hooks):
        with model.hooks(prefill_hooks), _watching(recorder):
            decoder.prefill(last_token_too=first_token_stage == "prefill")
        with model.hooks(generation_hooks), _watching(recorder):
            decoder.decode(max_new_tokens, bar)
    return decoder.result(return_type, is_single=isinstance(input, str), recorder=recorder)


class _Decoder:
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
        """Read tokens; `n_steps` is how many steps there may be from this one on."""
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
        """Give the state to a graph that can run the coming steps, or take it back."""
        if self.graph is not None and not self.graph.is_valid:
            self.state, self.graph = self.graph.state(), None
        if self.graph is None and self.state is not None and self.step > 1:
            self.graph = captured(self.model, self.state, n_steps)
            self.state = self.state if self.graph is None else None

    def _state_now(self) -> HybridState:
        """Return the state of the rows that go on."""
        state = self.state if self.graph is None else self.graph.state()
        assert state is not None
        return state

    def _choose(self) -> Tensor:
        """Append a token to every row that goes on; return those that still go on after it."""
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
                "so that no token is the best. A hook left them so, or a value outgrew the dtype"
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
        """Return a value of the rows that go on, with `fill` in those that have ended."""
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
        """Return the last tokens of a row's prompt, enough to read new ones after them."""
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
        """Return what `return_type` names."""
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
        """Return each row's new text, without EOS and what follows a stop string."""
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


def _prompt(
    model: LanguageModel,
    input: Any,
    is_text: bool,
    attention_mask: Tensor | None,
    state: HybridState | None,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
) -> tuple[Tensor, Tensor | None]:
    """Return tokens whose rows end at the right edge, and their mask if any is padded."""
    if is_text:
        if attention_mask is not None:
            raise ValueError(
                "text brings its own mask: leave attention_mask out, or pass tokens with it"
            )
        input, attention_mask = model.encode_texts(
            input, prepend_bos, padding_side or "left", continues=state is not None
        )
        tokens = checked_tokens(model, input)
    else:
        is_masked = attention_mask is not None
        tokens, attention_mask = checked_batch(model, input, attention_mask)
        if not is_masked and model.tokenizer is not None:
            refuse_unequal_ends(tokens, model.text)
    if attention_mask is None:
        return tokens, None
    layout = lay_out(tokens, state, attention_mask, None)
    if not layout.has_padding:
        return tokens, None
    order = layout.is_real.int().argsort(dim=1, stable=True)
    return tokens.gather(1, order), layout.is_real.long().gather(1, order)


def _refuse_idle_hooks(
    n_pos: int,
    max_new_tokens: int,
    first_token_stage: str,
    prefill_hooks: Sequence[HookSpec],
    generation_hooks: Sequence[HookSpec],
) -> None:
    """Refuse hooks of a stage that this call does not have, unless the other has them too."""
    prefills, generates = stages_of(n_pos, max_new_tokens, first_token_stage)
    if not generates:
        refuse_ignored(
            "prefill chooses the one new token; give max_new_tokens=2 or more, or "
            "first_token_stage='generation'",
            generation_hooks=[h for h in generation_hooks if h not in prefill_hooks],
        )
    if not prefills:
        refuse_ignored(
            "the prompt's one token is read in generation; give first_token_stage='prefill'",
            prefill_hooks=[h for h in prefill_hooks if h not in generation_hooks],
        )


def stages_of(n_pos: int, max_new_tokens: int, first_token_stage: str) -> tuple[bool, bool]:
    """Return whether a generation has a prefill, and whether it has a stage of generation.

    `generate` refuses hooks of a stage that is not there. What gives a user's hooks on, in parts of
    one token or for one new token, asks here which of them to give.

    Args:
        n_pos: tokens of the prompt that are read in this call.
        max_new_tokens, first_token_stage: of `generate`.
    """
    first = first_token_stage == "prefill"
    return first or n_pos > 1, not first or max_new_tokens > 1


def _stop_strings(given: str | Sequence[str] | None) -> list[str]:
    """Return the strings that end a text; None is none."""
    found = [given] if isinstance(given, str) else list(given or ())
    if wrong := [s for s in found if not isinstance(s, str)]:
        raise ValueError(f"stop_strings holds {wrong[0]!r}: give strings")
    if "" in found:
        raise ValueError("stop_strings: an empty one would end every text at once, leave it out")
    return found


def _eos(
    model: LanguageModel, stop_at_eos: bool, eos_token_id: int | Sequence[int] | None
) -> Sequence[int]:
    if not stop_at_eos:
        return ()
    if eos_token_id is not None:
        ends = torch.as_tensor(eos_token_id).reshape(-1).tolist()
        most = model.cfg.d_vocab - 1
        return [check_count("eos_token_id", end, 0, most, "the vocabulary") for end in ends]
    return model.cfg.eos_token_ids if model.tokenizer is None else model.text.eos


def _watching(recorder: Recorder | None) -> AbstractContextManager[Any]:
    return nullcontext() if recorder is None else recorder.watching()
