"""Published results, and the same measures on the packaged models, one file an experiment."""
