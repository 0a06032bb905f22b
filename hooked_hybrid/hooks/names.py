"""Hook names: TransformerLens's shorthand, and errors that suggest the nearest names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable

GROUPS: dict[str, frozenset[str]] = {
    "attn": frozenset(
        "q k v z rot_q rot_k attn_scores pattern result q_input k_input v_input".split()
    ),
    "mixer": frozenset(
        "in_proj gate conv input_gate rec_gate log_decay ssm_write ssm_state ssm_y gated "
        "ssm_input dt_low ssm_B ssm_C dt_proj ssm_dt ssm_decay".split()
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
NameFilter = str | Collection[str] | Callable[[str], bool]


class HookNameError(KeyError):
    """A name, shorthand or predicate that matches no hook point."""

    def __str__(self) -> str:
        return str(self.args[0])


def get_act_name(name: str, layer: int | None = None, layer_type: str | None = None) -> str:
    """Return the full hook name of a shorthand, as TransformerLens's function of this name.

    Args:
        name: a full name (returned as it is), or the part after `hook_`.
        layer: index of the block; None for the model's own points.
        layer_type: the submodule ("attn" or "a", "mixer", "mlp" or "m", "ln1", "ln2"; "b" for the
            block itself).

    Examples: `("pattern", 2)` is `blocks.2.attn.hook_pattern`; `("ssm_state", 0)` is
    `blocks.0.mixer.hook_ssm_state`; `("scale", 1, "ln1")` is `blocks.1.ln1.hook_scale`.
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


def resolve(key: Shorthand, names: Collection[str], n_layers: int) -> str:
    """Return the full name in `names` for a full name or a shorthand.

    Args:
        key: a full name, or `(name, layer)` or `(name, layer, layer_type)`; a negative layer
            counts from the last block.
        names: what exists.
        n_layers: blocks of the model.

    Raises:
        HookNameError: nothing matches; the message lists the nearest names.
    """
    if not isinstance(key, str | tuple) or not key:
        raise HookNameError(f"{key!r} is not a hook name: give a name, or (name, layer)")
    if isinstance(key, str):
        full = key if key in names else get_act_name(key)
    else:
        name, layer, layer_type = (*key, None, None)[:3]
        if isinstance(layer, int) and layer < 0:
            layer += n_layers
        full = get_act_name(str(name), layer, layer_type)  # type: ignore[arg-type]
    found = find(full, names)
    if found is None:
        raise HookNameError(unknown_name(full, names))
    return found


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
        f"run_with_cache(..., names_filter=[{name!r}]) keeps it alone, names_filter=lambda name: "
        "True every point"
    )


def matching(selector: NameFilter, names: Collection[str]) -> list[str]:
    """Return the names a filter selects, in the order of `names`.

    Args:
        selector: one name, several, or a predicate on names.
        names: what exists.

    Raises:
        HookNameError: a name that does not exist, or a predicate that selects none.
        TypeError: `selector` is of another kind.
    """
    if isinstance(selector, str):
        selector = [selector]
    if callable(selector):
        found = [name for name in names if selector(name)]
        if not found:
            raise HookNameError(
                f"the name filter {getattr(selector, '__qualname__', selector)} is true of none of "
                f"the {len(names)} hook points, which look like {', '.join(list(names)[:4])}"
            )
        return found
    if not isinstance(selector, Collection) or not all(isinstance(n, str) for n in selector):
        raise TypeError(
            f"a name filter is a name, a list of names or a predicate, not {selector!r}"
        )
    for name in selector:
        if name not in names:
            raise HookNameError(unknown_name(name, names))
    if not selector:
        raise HookNameError("the name filter is an empty list: it would keep nothing")
    wanted = set(selector)
    return [name for name in names if name in wanted]
