"""Path patching: the effect of one component on another directly, or through others.

A *sender* writes to the residual stream and a *receiver* reads it; `path_ends` lists both. The
receiver's input is the clean stream with the sender's output replaced by that of the corrupted run.
Later components run as usual. The change of the metric is the effect of this path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.analysis.metrics import Metric
from hooked_hybrid.analysis.path_ends import End
from hooked_hybrid.analysis.path_runs import PathOptions, Paths
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.analysis.watching import attention_of
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.shapes import Tokens


@torch.no_grad()
def path_patch(
    model: HookedHybrid,
    clean_tokens: Tokens,
    corrupted_cache: Mapping[Any, Tensor],
    senders: End | Sequence[End],
    receivers: End | Sequence[End],
    metric: Metric,
    **options: Unpack[PathOptions],
) -> Float[Tensor, "*batch"]:
    """Return the metric of the clean run in which receivers read corrupted senders.

    Each receiver reads the clean stream plus the difference, corrupted minus clean, of the outputs
    of all senders before it. All receivers are set at once, so that none reads the effect on
    another.

    Args:
        model: any hybrid.
        clean_tokens: the tokens to run.
        corrupted_cache: of another run of the same shape, with the senders' hook points.
        senders, receivers: one or several entries of the tables of `path_ends`.
        metric: of the logits; [] or [batch].
        options: see `PathOptions`.

    Raises:
        ValueError: an unknown sender, receiver, head or option; senders after all receivers; a
            corrupted run of another shape; a metric of another shape.
        HookNameError: a layer without such a hook point, or a value that the cache lacks.

    Source: Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching"; Wang et
    al. 2022, "Interpretability in the wild", section 3.1, whose MLPs are computed again: give
    `through="mlps"`.

    Examples:
        >>> _, other = model.run_with_cache(riga)
        >>> change = analysis.path_patch(
        ...     model, tokens, other, ("z", 2), ("k_input", 5), metric, through="mlps"
        ... )
        >>> change.shape
        torch.Size([])
    """
    paths = Paths(model, clean_tokens, corrupted_cache, senders, receivers, metric, options)
    if not any(paths.is_heard(sender) for sender in paths.senders):
        raise ValueError(f"{senders!r} write after {receivers!r} have read: there is no path")
    return paths.value(paths.senders)


@torch.no_grad()
def path_patch_each(
    model: HookedHybrid,
    clean_tokens: Tokens,
    corrupted_cache: Mapping[Any, Tensor],
    senders: Sequence[End],
    receivers: End | Sequence[End],
    metric: Metric,
    verbose: bool = True,
    **options: Unpack[PathOptions],
) -> list[Float[Tensor, "*batch"]]:
    """Return metric(receivers read this sender corrupted) - metric(clean), for each sender.

    A sender after all receivers has an effect of 0.

    Args:
        model, clean_tokens, corrupted_cache, senders, receivers, metric: as in `path_patch`.
        verbose: show a progress bar.
        options: see `PathOptions`.

    Raises:
        ValueError, HookNameError: as `path_patch`.

    Examples:
        >>> _, other = model.run_with_cache(riga)
        >>> senders = [("embed",), ("z", 2), ("z", 5)]
        >>> changes = analysis.path_patch_each(
        ...     model, tokens, other, senders, ("final",), metric, verbose=False
        ... )
        >>> len(changes)
        3
    """
    paths = Paths(model, clean_tokens, corrupted_cache, senders, receivers, metric, options)
    clean, effects = paths.clean_value(), []
    for sender in tqdm(paths.senders, "path patching", unit="sender", disable=not verbose):
        value = paths.value([sender]) if paths.is_heard(sender) else clean
        effects.append(value - clean)
    return effects


def path_patch_heads(
    model: HookedHybrid,
    clean_tokens: Tokens,
    corrupted_cache: Mapping[Any, Tensor],
    receivers: End | Sequence[End],
    metric: Metric,
    verbose: bool = True,
    **options: Unpack[PathOptions],
) -> HeadScores:
    """Return metric(receivers read this head corrupted) - metric(clean), for every head.

    A metric with a value for each row is averaged over rows. A head after all receivers has an
    effect of 0.

    Args:
        model, clean_tokens, corrupted_cache, receivers, metric, verbose, options: as in
            `path_patch_each`.

    Raises:
        ValueError, HookNameError: as `path_patch`.

    Examples:
        >>> _, other = model.run_with_cache(riga)
        >>> end = ("final",)
        >>> scores = analysis.path_patch_heads(model, tokens, other, end, metric, verbose=False)
        >>> scores.layers, scores.values.shape
        ((2, 5), torch.Size([2, 8]))
    """
    n_heads = {i: mixer.n_heads for i, mixer in attention_of(model).items()}
    heads = [("z", i, head) for i, n in n_heads.items() for head in range(n)]
    effects = path_patch_each(
        model, clean_tokens, corrupted_cache, heads, receivers, metric, verbose, **options
    )
    means = torch.stack([effect.mean() for effect in effects])
    by_layer = dict(zip(n_heads, means.split(list(n_heads.values())), strict=True))
    return HeadScores.of(by_layer, "change of the metric by path patching")
