"""`HookedHybridLM`: any hooked model, with any hooks, as a model of EleutherAI's lm-eval.

Importing this module registers it as `hooked_hybrid`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from hooked_hybrid.evaluation.batching import MOST_ROWS, Batching, may_cut, read_batch_size
from hooked_hybrid.evaluation.conversation import as_text
from hooked_hybrid.evaluation.forms import Form, HeadChoice, Stage
from hooked_hybrid.evaluation.generating import GenerationPlan, read_plan, texts_after
from hooked_hybrid.evaluation.loading import load_with_tokenizer
from hooked_hybrid.evaluation.scoring import Score, score, truncate
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.options import check_choice, refuse_ignored, require

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError:
    require("lm_eval")
    raise

MAX_LENGTH = 2048
"""Most tokens read at a time if the checkpoint gives no limit: lm-eval's own default."""

log = logging.getLogger(__name__)
Encoded = tuple[Any, list[int], list[int]]


@register_model("hooked_hybrid")
class HookedHybridLM(TemplateLM):
    """A `HookedHybrid` with hooks attached, for `lm_eval.simple_evaluate` and lm-eval's program.

    Log-likelihoods are scored in the stage "prefill": `fwd_hooks` and `prefill_hooks` act,
    `generation_hooks` and `stage="generation"` do not. Batches are made here, so that hooks must
    treat rows alike; one that is not `per_position` gets each input whole and unpadded. lm-eval's
    `use_cache` stores by request and not by hooks: give each form its own cache, or none.

    Args:
        pretrained: a model, or what `HookedHybrid.from_pretrained` loads.
        k: keep this many heads in each attention layer and position; None keeps all.
        stage: where `k` acts: "both" prefill and generation, or "generation" only.
        score: which heads are kept, see `forms.Form`.
        fwd_hooks, prefill_hooks, generation_hooks: further hooks, as `generate` takes them.
        first_token_stage: of `generate`.
        tokenizer: a tokenizer, or a folder that holds one, instead of the checkpoint's own.
        dtype, device, revision, config_overrides: of loading, not for a model in memory; dtype
            None is float32; device None is the GPU, or the CPU without one.
        batch_size: rows of a forward, or "auto": as many as fit in memory, up to `max_batch_size`
            (64) in generation.
        max_batch_size: see `batch_size`.
        max_length: most tokens read; the beginning of a longer request is left out. None is the
            checkpoint's limit, else 2048.
        max_gen_toks: tokens generated if a task does not set it.
        add_bos_token: whether BOS is prepended; None follows the model's training.
        prefix_token_id: the token before a text without a context; None is BOS, else EOS.
        share_prefixes: compute shared beginnings of requests once, see `scoring.score`.

    Raises:
        ValueError: no tokenizer, or an argument that would be misread.
        weights_conversion.CheckpointError: a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Path | HookedHybrid,
        k: int | None = None,
        stage: Stage = "both",
        score: HeadChoice = "entropy",
        *,
        fwd_hooks: Iterable[HookSpec] = (),
        prefill_hooks: Iterable[HookSpec] = (),
        generation_hooks: Iterable[HookSpec] = (),
        first_token_stage: Literal["prefill", "generation"] = "prefill",
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        share_prefixes: bool = True,
        **config_overrides: Any,
    ) -> None:
        super().__init__()
        check_choice("stage", stage, ("both", "generation"))
        if k is None:
            refuse_ignored(
                "all heads are kept; give k",
                stage=None if stage == "both" else stage,
                score=None if score == "entropy" else score,
            )
        if batch_size != "auto" and not str(batch_size).startswith("auto"):
            refuse_ignored("it is for batch_size='auto'", max_batch_size=max_batch_size)
        for what, size in (
            ("max_batch_size", max_batch_size),
            ("max_length", max_length),
            ("max_gen_toks", max_gen_toks),
        ):
            if size is not None and size < 1:
                raise ValueError(f"{what}={size}: give 1 or more")
        self.rows = read_batch_size(batch_size)
        self.max_rows = max_batch_size or MOST_ROWS
        loading = {"dtype": dtype, "device": device, "revision": revision}
        self.model = load_with_tokenizer(pretrained, tokenizer, config_overrides, **loading)
        self.name = "model" if isinstance(pretrained, HookedHybrid) else str(pretrained)
        self.tokenizer = self.model.text.tokenizer
        self.form = Form("given", k, score)
        hooks = self.form.hooks(self.model.cfg)
        self.stage = stage
        self.fwd_hooks = [*fwd_hooks, *(hooks if stage == "both" else ())]
        self.prefill_hooks = list(prefill_hooks)
        self.generation_hooks = [*generation_hooks, *(hooks if stage == "generation" else ())]
        self.model.check_hooks_to_add(
            (*self.fwd_hooks, *self.prefill_hooks, *self.generation_hooks)
        )
        self.first_token_stage, self.share_prefixes = first_token_stage, share_prefixes
        self.max_length = max_length or self.model.cfg.n_ctx or MAX_LENGTH
        self.max_gen_toks = max_gen_toks
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id
        self._device = self.model.device

    # --- tokens ---------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End-of-sequence token, or BOS if there is none.

        Raises:
            ValueError: the model has neither.
        """
        text = self.model.text
        found = text.eos[0] if text.eos else text.bos
        if found is None:
            raise ValueError("the model has neither EOS nor BOS: give prefix_token_id=")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.model.text.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches prompts made with this tokenizer."""
        own = getattr(self.tokenizer, "name_or_path", None)
        return str(own or self.name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text, after BOS if wanted; None follows the model's training.

        A text that begins with BOS, as chat templates write it, gets no second one. The EOS that
        some tokenizers append is never added, as text always follows here.
        """
        prepend = add_special_tokens
        if prepend is None:
            prepend = self.add_bos_token
        if prepend is None:
            prepend = self.model.text.prepends_bos
        return self.model.text.encode(string, prepend_bos=prepend, ends=False)

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, see `conversation.as_text`."""
        return as_text(self.tokenizer, chat_history, add_generation_prompt)

    # --- log-likelihoods ------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, is greedy) of each (strings, context, continuation)."""
        n_cut = sum(len(c) + len(more) > self.max_length + 1 for _, c, more in requests)
        if n_cut:
            log.warning(
                "%d of %d requests are longer than max_length=%d tokens: their beginnings are left "
                "out",
                *(n_cut, len(requests), self.max_length),
            )
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            found: list[Score] = score(
                self.model,
                [truncate(c, more, self.max_length) for _, c, more in requests],
                [*self.fwd_hooks, *self.prefill_hooks],
                self.rows,
                self.share_prefixes,
                bar.update,
            )
        answers = [(answer.logprob, answer.is_greedy) for answer in found]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability (nats) of each text, read in windows of `max_length`.

        The windows are lm-eval's: each token is predicted once, with as much context as fits.
        """
        windows: list[Encoded] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (logprob, _) in zip(owners, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation -----------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates after each context, up to a stop string or EOS.

        Contexts with equal arguments are run together. The beginning of a context is left out if
        `max_length` would have no room for the new tokens.

        Raises:
            ValueError: an argument that `generate` does not take, or no room for a context.
        """
        eos = self.model.text.decode([self.eot_token_id])
        groups: dict[GenerationPlan, list[int]] = {}
        for i, request in enumerate(requests):
            plan = read_plan(request.args[1], eos, self.max_gen_toks)
            groups.setdefault(plan, []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for plan, members in groups.items():
                contexts = [self._with_room(requests[i].args[0], plan) for i in members]
                written = texts_after(
                    *(self.model, contexts, plan, self._batching(), bar.update),
                    fwd_hooks=self.fwd_hooks,
                    prefill_hooks=self.prefill_hooks,
                    generation_hooks=self.generation_hooks,
                    first_token_stage=self.first_token_stage,
                )
                for i, text in zip(members, written, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _with_room(self, context: str, plan: GenerationPlan) -> list[int]:
        """Return the tokens of a context, only its end if new tokens would not fit otherwise."""
        room = self.max_length - plan.max_new_tokens
        if room < 1:
            raise ValueError(
                f"{plan.max_new_tokens} new tokens leave no room for a context in max_length="
                f"{self.max_length}: set max_gen_toks lower, or max_length higher"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            log.warning(
                "a context of %d tokens is cut to its last %d: max_length=%d, %d of them new",
                *(len(tokens), room, self.max_length, plan.max_new_tokens),
            )
        return tokens[-room:]

    def _batching(self) -> Batching:
        """Return the batching of a generation, without padding if a hook needs the whole input."""
        hooks = (*self.fwd_hooks, *self.prefill_hooks, *self.generation_hooks)
        with self.model.hooks(fwd_hooks=hooks):
            return Batching(self.rows, may_cut(self.model.hook_points()), self.max_rows)

    def get_model_info(self) -> dict[str, Any]:
        """Return what was evaluated, for lm-eval's record of results."""
        return {
            "model_name": self.name,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "k": self.form.k,
            "heads_chosen_by": self.form.by,
            "stage": self.stage,
            "n_hooks": {
                "both": len(self.fwd_hooks),
                "prefill": len(self.prefill_hooks),
                "generation": len(self.generation_hooks),
            },
        }
