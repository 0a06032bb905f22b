"""The papers' tables and figures, one by one: run, set beside what was published, and judged."""
