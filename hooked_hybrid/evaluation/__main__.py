"""lm-eval's own program with `--model hooked_hybrid` in it: `python -m hooked_hybrid.evaluation`.

lm-eval finds models only in its own table, so this module registers one and then starts lm-eval's
program. It accepts every argument of `lm_eval`.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import hooked_hybrid.evaluation.lm  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
