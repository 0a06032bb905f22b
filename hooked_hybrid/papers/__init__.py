"""The papers' tables and figures, one by one: run, compared with what was published, and judged."""
