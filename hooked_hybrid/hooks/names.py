"""Hook names: how they are spelled, and errors that suggest the nearest names.

Every function that takes hook names takes them in these spellings, alone or in a list:

- `"blocks.2.attn.hook_z"`, the full name;
- `("z", 2)`, the part after `hook_` and the layer, or `"z2"`: TransformerLens's shorthand;
- `"blocks.*.attn.hook_z"`, a pattern of the shell, for every name that fits. A star also stands
  for dots, so that `"*"` is every hook point, the large ones too;

or a predicate on full names.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeGuard

GROUPS: dict[str, frozenset[str]] = {
    "attn": frozenset(
        "q k v z rot_q rot_k attn_scores pattern result q_input k_input v_input".split()
    ),
    "mixer": frozenset(
        "in_proj gate conv input_gate rec_gate log_decay ssm_write ssm_state ssm_y gated "
        "ssm_input dt_low ssm_B ssm_C dt_proj ssm_dt ssm_decay ssm_scores ssm_pattern".split()
    ),
    "mlp": frozenset(
        "pre act pre_linear post "
        "router_logits expert_weights expert_indices expert_post expert_out".split()
    ),
}
"""The submodule of a block that has each shorthand name; all other names belong to the block."""

ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp"} | dict.fromkeys(
    ("b", "block", "blocks"), ""
)

Shorthand = str | tuple[str | int | None, ...]
"""One name in any spelling: a full name, a shorthand or a pattern."""
NameFilter = Shorthand | Collection[Shorthand] | Callable[[str], bool]
"""Names in any spelling, one or several, or a predicate on full names."""
CacheFilter = NameFilter | Literal[True]
"""A filter of a cache; True means every point except the large ones."""

WILD = frozenset("*?[")
"""Characters of a pattern, which no name has."""


class HookNameError(KeyError):
    """A name, shorthand or predicate that matches no hook point.

    Examples:
        >>> model.run_with_hooks(tokens, fwd_hooks=[("hook_embedd", lambda x, hook: x)])
        Traceback (most recent call last):
            ...
        hooked_hybrid.hooks.names.HookNameError: no hook point is named 'hook_embedd'; the ...
    """

    def __str__(self) -> str:
        return str(self.args[0])


def get_act_name(name: str, layer: int | None = None, layer_type: str | None = None) -> str:
    """Return the full hook name of a shorthand, as TransformerLens's function of this name.

    Args:
        name: a full name (returned as it is), or the part after `hook_`.
        layer: index of the block; None for the model's own points.
        layer_type: the submodule ("attn" or "a", "mixer", "mlp" or "m", "ln1", "ln2"; "b" for the
            block itself).

    Examples:
        >>> from hooked_hybrid import get_act_name
        >>> get_act_name("pattern", 2), get_act_name("ssm_state", 0)
        ('blocks.2.attn.hook_pattern', 'blocks.0.mixer.hook_ssm_state')
        >>> get_act_name("scale", 1, "ln1")
        'blocks.1.ln1.hook_scale'
    """
    if "." in name or name.startswith("hook_"):
        return name
    if match := re.fullmatch(r"([A-Za-z_]+)(\d+)([a-z]*\d?)", name):  # "pattern2", "scale1ln1"
        name, layer, layer_type = match[1], int(match[2]), match[3] or layer_type
    name = ALIASES.get(name, name)
    layer_type = LAYER_TYPES.get(layer_type or "", layer_type)
    if layer is None and layer_type is None and name in ("scale", "normalized"):
        layer_type = "ln_final"
    if layer is None and name == "logits":
        layer_type = "unembed"
    if layer_type is None and layer is not None:
        layer_type = next((group for group, names in GROUPS.items() if name in names), None)
    parts = [f"blocks.{layer}" if layer is not None else None, layer_type, f"hook_{name}"]
    return ".".join(part for part in parts if part)


def is_pattern(key: Any) -> bool:
    """Whether a key is a pattern of the shell, such as "blocks.*.hook_resid_post"."""
    return isinstance(key, str) and not WILD.isdisjoint(key)


def is_shorthand(key: Any) -> TypeGuard[tuple[str | int | None, ...]]:
    """Whether a key is a shorthand such as `("z", 2)` or `("scale", 2, "ln1")`, no list of names.

    The second entry of a shorthand is a layer or None, and that of a list of names is a name.
    """
    if not (isinstance(key, tuple) and 2 <= len(key) <= 3 and isinstance(key[0], str)):
        return False
    layer, layer_type = (*key[1:], None)[:2]
    is_layer = layer is None or (hasattr(layer, "__index__") and not isinstance(layer, bool))
    return is_layer and (layer_type is None or isinstance(layer_type, str))


def resolve(key: Shorthand, names: Collection[str], n_layers: int) -> str:
    """Return the full name in `names` for a full name, a shorthand, or a pattern that fits one.

    Args:
        key: a full name, `(name, layer)` or `(name, layer, layer_type)`, or a pattern; a negative
            layer counts from the last block.
        names: what exists.
        n_layers: blocks of the model.

    Raises:
        HookNameError: nothing matches, and the message lists the nearest names; or several names
            fit a pattern.
    """
    if not isinstance(key, str | tuple) or not key:
        raise HookNameError(f"{key!r} is not a hook name: give a name, or (name, layer)")
    if is_pattern(key):
        fitting = fit(str(key), names)
        if len(fitting) > 1:
            shown = ", ".join(fitting[:4]) + (", ..." if len(fitting) > 4 else "")
            raise HookNameError(
                f"{len(fitting)} names fit {key!r}, and one is wanted here: {shown}"
            )
        return fitting[0]
    layer_type = None
    if isinstance(key, str):
        full = key if key in names else get_act_name(key)
    else:
        name, layer, layer_type = (*key, None, None)[:3]
        if hasattr(layer, "__index__") and operator.index(layer) < 0:  # type: ignore[arg-type]
            layer = operator.index(layer) + n_layers  # type: ignore[arg-type]
        full = get_act_name(str(name), layer, layer_type)  # type: ignore[arg-type]
    found = find(full, names)
    if found is None and layer_type is None and "." not in str(key):  # of another kind of part
        found = find(re.sub(r"\.\w+\.(?=hook_)", ".", full), names)
    if found is None:
        raise HookNameError(unknown_name(key if isinstance(key, str) else full, names))
    return found


def fit(pattern: str, names: Collection[str]) -> list[str]:
    """Return the names that fit a pattern of the shell, in their order.

    Raises:
        HookNameError: there is none.
    """
    fitting = [name for name in names if fnmatchcase(name, pattern)]
    if not fitting:
        leaf = pattern.rsplit(".", 1)[-1]
        near = [] if is_pattern(leaf) else [n for n in names if n.rsplit(".", 1)[-1] == leaf]
        like = near or list(names)
        raise HookNameError(f"no hook point fits {pattern!r}; they look like {', '.join(like[:4])}")
    return fitting


def find(full: str, names: Collection[str]) -> str | None:
    """Return `full` if it exists; for a name of a block itself, the only match inside the block.

    Args:
        full: the result of `get_act_name`, which treats names outside `GROUPS` as names of the
            block itself.
        names: what exists.

    Returns:
        None if there is no match, or several.
    """
    if full in names:
        return full
    block, _, leaf = full.rpartition(".")
    if not re.fullmatch(r"blocks\.\d+", block):
        return None
    inside = [n for n in names if n.startswith(f"{block}.") and n.rpartition(".")[2] == leaf]
    return inside[0] if len(inside) == 1 else None


def unknown_name(name: str, names: Iterable[str]) -> str:
    """Return an error message that lists the names nearest to one that does not exist."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    leaf = name.rsplit(".", 1)[-1]
    short = leaf.removeprefix("hook_")
    leaves = (leaf, f"hook_{ALIASES.get(short, short)}")  # a shorthand lacks the layer
    near += [n for n in names if n.rsplit(".", 1)[-1] in leaves and n not in near]
    if not near:
        by_leaf = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
        close = difflib.get_close_matches(leaves[1], by_leaf, n=4, cutoff=0.6)
        near = [by_leaf[n] for n in close]
    hint = f"; the nearest are {', '.join(near[:4])}" if near else ""
    return f"no hook point is named {name!r}{hint}"


def not_kept(name: str, is_large: bool) -> str:
    """Return an error message for a point that exists but is not in a cache."""
    if name.endswith("_grad"):
        return f"the gradient {name!r} was not kept: run_with_cache(..., incl_bwd=True) keeps it"
    why = ", as it is large" if is_large else ""
    return (
        f"{name!r} is a hook point of this model, and was not kept{why}: "
        f"run_with_cache(..., names_filter=[{name!r}]) keeps it alone, names_filter='*' every "
        "point, the large ones too"
    )


def listed(selector: Any) -> list[Shorthand]:
    """Return the names of a filter that is no predicate, as they are spelled.

    Raises:
        TypeError: `selector` is of another kind.
        HookNameError: it is an empty list.
    """
    several = [selector] if isinstance(selector, str) or is_shorthand(selector) else selector
    is_list = isinstance(several, Collection)
    if not is_list or not all(isinstance(n, str) or is_shorthand(n) for n in several):
        raise TypeError(
            "a name filter is a name, a pattern, (name, layer), a list of these or a predicate, "
            f"not {selector!r}"
        )
    if not several:
        raise HookNameError("the name filter is an empty list: it would keep nothing")
    return list(several)


def matching(
    selector: NameFilter, names: Collection[str], n_layers: int | None = None
) -> list[str]:
    """Return the names a filter selects, each once, in the order of `names`.

    Args:
        selector: names in any spelling, one or several, or a predicate on full names.
        names: what exists.
        n_layers: blocks of the model, from which negative layers count; None means that `names`
            has the last one.

    Raises:
        HookNameError: a name that does not exist, or a pattern or predicate that selects none.
        TypeError: `selector` is of another kind.
    """
    if isinstance(selector, str) and selector in names:
        return [selector]
    if callable(selector):
        found = [name for name in names if selector(name)]
        if not found:
            raise HookNameError(
                f"the name filter {getattr(selector, '__qualname__', selector)} is true of none of "
                f"the {len(names)} hook points, which look like {', '.join(list(names)[:4])}"
            )
        return found
    if isinstance(selector, list | tuple | set) and selector:
        wanted = {name for name in selector if isinstance(name, str) and name in names}
        if len(wanted) == len(selector):  # full names, each once: the usual list
            return [name for name in names if name in wanted]
    wanted = set()
    for key in listed(selector):
        if isinstance(key, str) and key in names:
            wanted.add(key)
        elif is_pattern(key):
            wanted.update(fit(str(key), names))
        else:
            n_layers = _n_layers(names) if n_layers is None else n_layers
            wanted.add(resolve(key, names, n_layers))
    return [name for name in names if name in wanted]


def names_in_layers(leaf: Shorthand, names: Iterable[str]) -> list[str]:
    """Return the names of one hook in the layers that have it.

    Args:
        leaf: what follows `hook_`, or names of at most one point in each layer, in any spelling.
        names: what exists.

    Raises:
        HookNameError: no name matches.
        ValueError: a name outside the layers, or several in one.
    """
    in_layers = [name for name in names if name.startswith("blocks.")]
    if isinstance(leaf, str) and (
        found := [name for name in in_layers if name.endswith(f".hook_{leaf}")]
    ):
        return found
    try:
        found = matching(leaf, in_layers)
    except HookNameError as error:
        raise HookNameError(f"no layer has {leaf!r}: {error}") from None
    layers = [name.split(".")[1] for name in found]
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"{leaf!r} selects several points of a layer, {', '.join(found[:4])}: name one of each"
        )
    return found


def _n_layers(names: Iterable[str]) -> int:
    """Return the number of blocks, of which the last one has a name."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
