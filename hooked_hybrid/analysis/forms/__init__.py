"""Linear forms of recurrences for analysis, with a file for each kind."""

from hooked_hybrid.analysis.forms.base import (
    FORMS,
    DecayRange,
    LinearForm,
    Ran,
    Terms,
    form_of,
    register_form,
)
from hooked_hybrid.analysis.forms.mamba import MambaForm
from hooked_hybrid.analysis.forms.rglru import RGLRUForm

register_form(RGLRUForm(), MambaForm())

__all__ = [
    "FORMS",
    "DecayRange",
    "LinearForm",
    "MambaForm",
    "RGLRUForm",
    "Ran",
    "Terms",
    "form_of",
    "register_form",
]
