"""Language benchmarks with interventions: any hooked model in EleutherAI's lm-eval.

`benchmarks` lists the papers' benchmarks; `lm.HookedHybridLM` is the model class (it needs lm-eval:
`pip install 'hooked-hybrid[eval]'`); `running.evaluate` runs tasks in several forms, and
`hooked-hybrid eval` is its command. lm-eval's own program runs with the model in it as
`python -m hooked_hybrid.evaluation`, or unchanged, with the path `PLUGIN` among its tasks:

    lm_eval --model hooked_hybrid --model_args pretrained=tiny-griffin,k=2 --tasks $PLUGIN,glue
"""

from pathlib import Path

PLUGIN = Path(__file__).parent / "lm_eval.yaml"
"""A task file that registers `--model hooked_hybrid` in lm-eval's own program."""
OWN_TASKS = Path(__file__).parent / "own_tasks"
"""Small tasks of this library, for `--include_path`, which need no network."""

__all__ = ["OWN_TASKS", "PLUGIN"]
