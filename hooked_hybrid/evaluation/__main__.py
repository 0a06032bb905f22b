"""lm-eval's own program with `--model hooked_hybrid` in it: `python -m hooked_hybrid.evaluation`.

lm-eval finds models in a table of its own and looks for no others, so that its program must be
started by somebody who registers one: this module. It takes every argument of `lm_eval`.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import hooked_hybrid.evaluation.lm  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
