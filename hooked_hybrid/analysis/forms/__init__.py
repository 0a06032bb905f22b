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
from hooked_hybrid.analysis.forms.mamba2 import Mamba2Form
from hooked_hybrid.analysis.forms.rglru import RGLRUForm

register_form(RGLRUForm(), MambaForm(), Mamba2Form())

__all__ = [
    "FORMS",
    "DecayRange",
    "LinearForm",
    "Mamba2Form",
    "MambaForm",
    "RGLRUForm",
    "Ran",
    "Terms",
    "form_of",
    "register_form",
]
