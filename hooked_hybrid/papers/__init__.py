"""The papers' tables and figures: run, compared with the published values, and judged."""
