"""`generate`: prefill and decoding steps, by the same forward over a state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.names import CacheFilter
from hooked_hybrid.model.checks import check_state, refuse_text_options
from hooked_hybrid.model.decoding import Decoder
from hooked_hybrid.model.recorder import Recorder
from hooked_hybrid.model.sampling import Sampling
from hooked_hybrid.model.text_model import check_batch, check_tokens, is_texts
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.options import check_choice, check_count, refuse_ignored
from hooked_hybrid.text.padding import refuse_unequal_ends
from hooked_hybrid.text.text import PaddingSide

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

GenerationReturn = Literal["input", "str", "tokens", "output"]


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
    names_filter: CacheFilter | None = None,
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
    """Continue prompts token by token, with hooks called in every forward.

    Args:
        model: runs the forwards.
        input: tokens [batch pos] or [pos], a text, or several.
        max_new_tokens: at most this many tokens are added to each row.
        fwd_hooks: attached throughout.
        prefill_hooks, generation_hooks: attached after `fwd_hooks`, in one stage only. Hooks of a
            stage that this call does not have are an error, unless they are in the other stage too.
        first_token_stage: which stage chooses the first new token. "prefill" reads the whole
            prompt in it (Hugging Face); "generation" reads the last prompt token in a separate
            step (Google's sampler), so that generation hooks also act on the first new token.
        state: the state that the prompts continue; it is not changed.
        attention_mask: 1 at tokens, 0 at padding; rows padded on the right are moved to the right
            end, so that new tokens follow old ones. Without it, padding is recognised as in the
            forward: the padding tokens at the beginning or end of a row.
        names_filter: the activations to cache, with `return_type="output"`: None for none, True
            for every point except the large ones, "*" for these too, or names in any spelling or a
            predicate, as in `run_with_cache`.
        do_sample: sample tokens; otherwise the most likely token is chosen (TransformerLens
            samples by default).
        temperature: of sampling, above 0; None is 1. As it approaches 0 the most likely token is
            chosen, also if it is too small to divide by. Without `do_sample`, 0 is accepted and
            has the same meaning.
        top_k, top_p: sample from the `top_k` most likely tokens; from the smallest set of most
            likely tokens with a probability of `top_p` or more.
        generator: gives the seed of the samples, on any device; None uses torch's global one.
            The tokens of row i depend on the seed, i and the row's own logits, and not on the
            other rows. A call takes one number from the generator.
        stop_at_eos: end a row at an end-of-sequence token.
        eos_token_id: replaces the model's own.
        stop_strings: end a row when its new text contains one of these; needs a tokenizer. The
            new text is decoded after the prompt's, so it keeps a blank before its first word; a
            string that begins in the prompt does not count.
        prepend_bos, padding_side: for text; BOS is not added when continuing from a state.
        return_type: "tokens" (prompt and new), "str" (their text), "output"
            (`GenerationOutput`), or "input" for the kind of the input.
        verbose: show a progress bar.

    Returns:
        Depends on `return_type`. For a single text, a single text is returned.

    Raises:
        ValueError: options that exclude each other or have no effect, or input that would be
            misread; later, logits that are NaN: the message names the row, the new token and the
            step, all from 0.
        HookNameError: a hook or filter that matches nothing; nothing has run then.

    Examples:
        >>> model.generate(text, 2, verbose=False)
        'eat a sandwich and sit in Dolores Park . eat a sandwich and sit in Dolores Park'
        >>> no_heads = interventions.keep_top_heads(0)
        >>> out = model.generate(
        ...     text, 2, fwd_hooks=no_heads, names_filter=True, return_type="output", verbose=False
        ... )
        >>> out.text, out.cache["z", 2].shape
        (['Lily Market'], torch.Size([1, 17, 8, 16]))
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
    check_state(model, state, tokens.shape[0])
    _refuse_idle_hooks(tokens.shape[1], max_new_tokens, first_token_stage, *hooks[1:])
    recorder = None if names_filter is None else Recorder(model, names_filter, tokens, state)
    decoder = Decoder(
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


def _prompt(
    model: LanguageModel,
    input: Any,
    is_text: bool,
    attention_mask: Tensor | None,
    state: HybridState | None,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
) -> tuple[Tensor, Tensor | None]:
    """Return left-padded tokens, and their mask if any row is padded."""
    if is_text:
        if attention_mask is not None:
            raise ValueError(
                "text brings its own mask: leave attention_mask out, or pass tokens with it"
            )
        input, attention_mask = model.encode_texts(
            input, prepend_bos, padding_side or "left", continues=state is not None
        )
        tokens = check_tokens(model, input)
    else:
        is_masked = attention_mask is not None
        tokens, attention_mask = check_batch(model, input, attention_mask)
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
    """Refuse hooks of a stage that this call does not have, unless the other stage has them."""
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

    `generate` refuses hooks of a stage that it does not have. Callers that pass on a user's hooks
    use this to select the hooks to pass.

    Args:
        n_pos: tokens of the prompt that are read in this call.
        max_new_tokens, first_token_stage: of `generate`.
    """
    first = first_token_stage == "prefill"
    return first or n_pos > 1, not first or max_new_tokens > 1


def _stop_strings(given: str | Sequence[str] | None) -> list[str]:
    """Return the strings that end a text; none for None."""
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
