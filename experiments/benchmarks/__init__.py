"""Benchmarks of this library against `transformers` and Google's `recurrentgemma`.

`python -m experiments.benchmarks --help` describes how to run them.
"""
