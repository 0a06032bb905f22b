"""What is done to a model in a NIAH experiment."""

from hooked_hybrid.niah.settings.setting import (
    Hooks,
    PerRow,
    Setting,
    depends_on_prompt,
    hooks_for,
    hooks_of_rows,
    settings_identity,
    top_k_settings,
)

__all__ = [
    "Hooks",
    "PerRow",
    "Setting",
    "depends_on_prompt",
    "hooks_for",
    "hooks_of_rows",
    "settings_identity",
    "top_k_settings",
]
