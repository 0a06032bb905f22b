"""Mutation testing: small faults are put into the code, one at a time, and the tests must notice.

    make mutants              # or: python -m tests.mutation --each 18 --seed 0 --only niah/scores

For each module of `TARGETS` a number of mutants is drawn at random, the same for the same seed. A
mutant differs from the code by one small change (see `mutants.py`): a comparison, a constant by
one, "and" for "or", a statement or an option left out, a slice longer by one. Those tests of
`TESTS` are run that reach its line, and the others of their files, the quickest first, until
one fails: then the mutant is killed. What no test notices lives: either a test is missing, or the
mutant is the same program by another spelling. `results/mutants` keeps what was found (a run that
stopped goes on there; `--again` tries those that lived once more) and which lines each test
reaches.

How it is quick: one process imports everything and collects the tests once, then forks for each
mutant, which changes the code of one function in memory and runs the tests chosen for it. A change
outside functions (a constant, a default) needs a process that imports anew, and so has each mutant
that lives: nothing that was computed at import hides it. Files are never changed.

Not `mutmut`: it changes the bodies of functions alone, no constant of a module, and puts functions
of its own in their place, while this library describes functions by their code. Not `cosmic-ray`:
it starts an interpreter for each mutant, and has no record of which tests reach a line.
"""

from __future__ import annotations

TARGETS = (
    "niah/scores",
    "evaluation/scoring",
    "niah/prompts",
    "niah/prompt_tokens",
    "niah/boundaries",
    "runs/statistics",
    "niah/cells",
    "runs/intervals",
    "model/decoding",
    "model/generate",
    "model/sampling",
    "niah/cached_state/sweep",
    "niah/cached_state/ways",
    "network/attention/key_room",
    "network/state",
    "accounting/plan/changes",
    "network/placement/offload",
    "accounting/plan/machine",
    "network/placement/places",
    "network/placement/homes",
    "accounting/plan/planner",
    "accounting/plan/planning",
    "network/placement/doors",
    "accounting/plan/working",
    "accounting/plan/split",
    "accounting/plan/stored",
)
"""Modules whose mutants are drawn."""

TESTS = (
    "niah/test_scores evaluation/test_scoring niah/test_prompts niah/test_summary "
    "runs/test_intervals model/test_generate interventions/test_following "
    "network/test_key_room network/test_state network/test_placement "
    "accounting/test_plan_counts network/test_placement_doors network/test_placement_faults "
    "accounting/test_plans accounting/test_plan_sizes network/test_placement_quantized "
    "text/test_padding model/test_options model/test_step_graph"
).split()
"""Files of `tests` that are run."""
