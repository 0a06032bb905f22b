"""What an evaluation makes of lm-eval's results."""

import pytest

from hooked_hybrid.evaluation.forms import FORMS
from hooked_hybrid.evaluation.work import _cell


def test_a_task_without_a_number_is_named():
    results = {"results": {"odd": {"alias": "odd", "sample_len": 3, "words,none": "none"}}}
    with pytest.raises(ValueError, match="odd has no numeric metric"):
        _cell("odd", FORMS["base"], results, 1.0)
