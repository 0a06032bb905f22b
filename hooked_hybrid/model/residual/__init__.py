"""The residual stream as a sum of parts."""
