"""Settings of NIAH experiments: the interventions on a model."""

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
