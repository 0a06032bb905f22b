"""Circuit analysis: what the parts of a model write, read, remember and retrieve."""
