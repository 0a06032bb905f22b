"""Attribution patching: the effect of every patch at once, by gradients.

To first order, putting the clean value of a hook point into the corrupted run changes the metric by
(clean - corrupted) . gradient. One backward pass gives the gradient at every point. At a
recurrence's state the gradient is total, including later states, so it estimates a patch of the
state at one position, which changes later states too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.analysis.metrics import Metric, measure
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.analysis.slopes import Slopes, through_softmax
from hooked_hybrid.hooks.marks import watcher
from hooked_hybrid.hooks.names import (
    CacheFilter,
    Shorthand,
    is_pattern,
    matching,
    names_in_layers,
    resolve,
)
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.model.text_model import check_batch
from hooked_hybrid.network.finite import require_numbers
from hooked_hybrid.shapes import Tokens

Axis = Literal["position", "head", "channel"]
Reduce = Axis | Literal["hook"] | Sequence[Axis] | None
PLACES = {"pos": "position", "query": "position", "head": "head", "kv_head": "head"}
"""The meaning of the axes of hook points in `reduce`; other axes are channels."""


@dataclass(frozen=True)
class Attribution:
    """The effect of patching each value, to first order.

    Attributes:
        values: by full hook name; with a leading batch axis if the metric has one value a row.
        axes: of each value.
        excluded: hook points that were left out, with the reason.
        change: metric(clean) - metric(corrupted).
        n_layers: of the model.

    Examples:
        >>> found = analysis.attribution_patching(
        ...     model, tokens, riga, metric, "blocks.*.attn.hook_z", "head", verbose=False
        ... )
        >>> found.axes
        {'blocks.2.attn.hook_z': ('head',), 'blocks.5.attn.hook_z': ('head',)}
        >>> found.values["blocks.5.attn.hook_z"].shape
        torch.Size([8])
    """

    values: dict[str, Tensor]
    axes: dict[str, tuple[str, ...]]
    excluded: dict[str, str]
    change: Float[Tensor, "*batch"]
    n_layers: int

    def __getitem__(self, key: Shorthand) -> Any:
        """Return the value of a full name or a shorthand, such as `("z", 2)`.

        A pattern, `"blocks.*.attn.hook_z"`, gives the attribution at all points that fit it.

        Raises:
            HookNameError: there is no attribution of this name; the nearest names are listed.
        """
        if is_pattern(key):
            found = matching(key, self.values.keys(), self.n_layers)
            return replace(
                self,
                values={name: self.values[name] for name in found},
                axes={name: self.axes[name] for name in found},
            )
        return self.values[resolve(key, self.values.keys(), self.n_layers)]

    def top(self, n: int) -> list[tuple[str, tuple[int, ...], float]]:
        """Return name, index and value of the `n` largest, by magnitude, the largest first.

        Raises:
            ValueError: a value that is NaN; the message names the hook point.

        Examples:
            >>> found = analysis.attribution_patching(
            ...     model, tokens, riga, metric, "blocks.*.attn.hook_z", verbose=False
            ... )
            >>> len(found.top(3))
            3
        """
        names = list(self.values)
        for name in names:
            require_numbers(self.values[name], f"the attribution at {name!r}")
        flat = torch.cat([self.values[name].flatten() for name in names])
        order = flat.abs().argsort(descending=True, stable=True)[:n].tolist()
        sizes = torch.tensor([self.values[name].numel() for name in names])
        ends = sizes.cumsum(0)
        found = []
        for i in order:
            which = int(torch.searchsorted(ends, i, right=True))
            value = self.values[names[which]]
            at = torch.unravel_index(torch.tensor(i - int(ends[which] - sizes[which])), value.shape)
            found.append((names[which], tuple(map(int, at)), float(flat[i])))
        return found

    def head_scores(self, leaf: Shorthand = "z") -> HeadScores:
        """Return the attribution of each head at one hook of the attention layers.

        A metric of each row is averaged over rows.

        Args:
            leaf: what follows `hook_`, "z", "q", "pattern", or names in any spelling.

        Raises:
            HookNameError: there are no attributions of this name.
            ValueError: they are not by head; give `reduce="head"`.

        Examples:
            >>> found = analysis.attribution_patching(
            ...     model, tokens, riga, metric, "blocks.*.attn.hook_z", "head", verbose=False
            ... )
            >>> found.head_scores().layers
            (2, 5)
        """
        by_layer = {}
        for name in names_in_layers(leaf, self.values):
            axes, value = self.axes[name], self.values[name]
            if axes[-1:] not in (("head",), ("kv_head",)) or len(axes) > 1 + ("batch" in axes):
                raise ValueError(f"{name!r} was reduced to axes {axes}: use reduce='head'")
            by_layer[int(name.split(".")[1])] = value.mean(0) if len(axes) > 1 else value
        return HeadScores.of(by_layer, f"change of the metric attributed to {leaf}")


def attribution_patching(
    model: HookedHybrid,
    clean_tokens: Tokens,
    corrupted_tokens: Tokens,
    metric: Metric,
    names_filter: CacheFilter | None = None,
    reduce: Reduce = "position",
    *,
    at: Literal["corrupted", "clean"] = "corrupted",
    attention_mask: Tensor | None = None,
    qk_fix: bool = False,
    max_bytes: int = 2**30,
    verbose: bool = True,
) -> Attribution:
    """Return (clean - corrupted) . gradient of the metric at every floating-point hook point.

    At "corrupted" it estimates metric(corrupted run with the clean value) - metric(corrupted); at
    "clean", metric(clean) - metric(clean run with the corrupted value).

    Args:
        model: any hybrid.
        clean_tokens, corrupted_tokens: two runs of the same shape.
        metric: of the logits, differentiable; [], or [batch] if rows do not mix.
        names_filter: hook points in any spelling ("blocks.2.attn.hook_z", ("z", 2),
            "blocks.*.attn.hook_z"), or a predicate; None and True mean all except the large ones.
            Integer points (the choice of experts) have no gradient; they are listed in `excluded`.
        reduce: the axes to keep, while others are summed over: "position", "head", "channel",
            several of these, "hook" for none, None for all. Points without any of these axes are
            excluded.
        at: the run whose gradients are taken.
        attention_mask: of both runs, if rows are padded.
        qk_fix: compute the softmax of patched queries, keys and scores exactly, instead of
            linearly; this takes two more runs of each attention layer. Not by channel or key.
        max_bytes: of values and gradients kept at a time; if exceeded, points are processed in
            groups, each with its own runs.
        verbose: show a progress bar.

    Raises:
        HookNameError: the filter matches nothing.
        ValueError: runs of different shapes; no hook points left; a metric of another shape, or
            without a gradient; an unknown `reduce` or `at`; `qk_fix` by channel.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023; `qk_fix` and no other correction
    of AtP* (Kramár et al. 2024).

    Examples:
        >>> found = analysis.attribution_patching(model, tokens, riga, metric, verbose=False)
        >>> found.values["blocks.5.hook_resid_pre"].shape  # by position
        torch.Size([16])
    """
    clean_tokens, corrupted_tokens, attention_mask = check_pair(
        model, clean_tokens, corrupted_tokens, attention_mask
    )
    if at not in ("corrupted", "clean"):
        raise ValueError(f"at={at!r}: give 'corrupted' or 'clean'")
    kept = _kept_axes(reduce)
    if qk_fix and "channel" in kept:
        raise ValueError(f"qk_fix with reduce={reduce!r}: qk_fix has no channels, give 'position'")
    names, excluded = _chosen(model, names_filter, reduce, kept)
    here, other = (clean_tokens, corrupted_tokens)[:: 1 if at == "clean" else -1]
    sign = -1 if at == "clean" else 1
    values: dict[str, Tensor] = {}
    axes: dict[str, tuple[str, ...]] = {}
    for group in _groups(model, here, names, attention_mask, max_bytes, verbose):
        slopes = Slopes(model, here, metric, group, attention_mask)
        with torch.no_grad():
            logits, donor = model.run_with_cache(
                other, names_filter=group, attention_mask=attention_mask
            )
            change = sign * (measure(metric, logits) - slopes.metric)
        for name in group:
            by_row = ("batch",) if slopes.metric.ndim else ()
            product = sign * slopes.times(name, donor[name])
            axes[name], values[name] = _reduced(product, model.hook_dict[name], kept, by_row)
    if qk_fix:
        for name, effect in through_softmax(model, here, other, metric, names, attention_mask):
            by_row = ("batch",) if change.ndim else ()
            _, values[name] = _reduced(sign * effect, model.hook_dict[name], kept, by_row)
    return Attribution(values, axes, excluded, change, model.cfg.n_layers)


def check_pair(
    model: HookedHybrid, clean: Tokens, corrupted: Tokens, mask: Tensor | None = None
) -> tuple[Tokens, Tokens, Tensor | None]:
    """Return two runs' tokens [batch pos] and the mask of both.

    Raises:
        ValueError: different shapes, no tokens, or different padding.
    """
    (clean, clean_mask), (corrupted, mask) = (
        check_batch(model, tokens, mask) for tokens in (clean, corrupted)
    )
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean tokens have shape {tuple(clean.shape)}, corrupted ones "
            f"{tuple(corrupted.shape)}: values are compared position by position"
        )
    if not (clean_mask is mask is None or mask is clean_mask):
        masks = [torch.ones_like(clean) if m is None else m for m in (clean_mask, mask)]
        if not torch.equal(*masks):
            raise ValueError(
                "clean and corrupted tokens are padded at different places: values are compared "
                "position by position"
            )
    return clean, corrupted, mask


def _kept_axes(reduce: Reduce) -> set[str]:
    kept = {reduce} if isinstance(reduce, str) else set(reduce or ())
    if unknown := kept - {"hook", "position", "head", "channel"}:
        raise ValueError(
            f"reduce={reduce!r}: {sorted(unknown)} is none of 'position', 'head', 'channel', "
            "'hook' and None"
        )
    kept.discard("hook")
    return {"position", "head", "channel", "key"} if reduce is None else kept  # type: ignore[return-value]


def _place(axis: str) -> str:
    """Return the meaning of an axis in `reduce`."""
    return axis if axis in ("batch", "key") else PLACES.get(axis, "channel")


def _chosen(
    model: HookedHybrid, names_filter: CacheFilter | None, reduce: Reduce, kept: set[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the hook points to attribute to, and the reasons to exclude others."""
    points, excluded = model.hook_dict, {}
    is_all = names_filter is None or names_filter is True
    asked = list(points) if is_all else matching(names_filter, points)  # type: ignore[arg-type]
    for name in asked:
        places = {_place(axis) for axis in points[name].axes}
        if points[name].is_integer:
            excluded[name] = "holds integers, which have no gradient"
        elif is_all and points[name].is_large:
            excluded[name] = "large: attributed to only when named"
        elif kept and not kept & places:
            excluded[name] = f"has axes {points[name].axes}, none kept by reduce={reduce!r}"
    if not (names := [name for name in asked if name not in excluded]):
        raise ValueError(f"nothing to attribute to: {excluded}")
    return names, excluded


@torch.no_grad()
def _groups(
    model: HookedHybrid,
    tokens: Tokens,
    names: list[str],
    mask: Tensor | None,
    max_bytes: int,
    verbose: bool,
) -> Iterator[list[str]]:
    """Return hook points in groups whose values, of two runs, and gradients fit into memory."""
    sizes: dict[str, int] = {}

    @watcher
    def weigh(value: Tensor, hook: HookPoint) -> None:
        sizes[str(hook.name)] = 3 * value.numel() * value.element_size()

    with model.hooks([(names, weigh)]):
        model(tokens, return_type="logits", attention_mask=mask)
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if not groups or sizes[name] > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= sizes[name]
    return iter(tqdm(groups, "attribution patching", unit="group", disable=not verbose))


def _reduced(
    product: Tensor, point: HookPoint, kept: set[str], by_row: tuple[str, ...]
) -> tuple[tuple[str, ...], Tensor]:
    """Return the axes that are kept, and the sum over the others."""
    keeps = [_place(axis) in kept or axis in by_row for axis in point.axes]
    summed = [i for i, keep in enumerate(keeps) if not keep]
    axes = tuple(axis for axis, keep in zip(point.axes, keeps, strict=True) if keep)
    return axes, product.sum(dim=summed) if summed else product
