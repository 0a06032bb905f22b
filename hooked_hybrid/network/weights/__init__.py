"""Weights: plain, factored, quantised."""
