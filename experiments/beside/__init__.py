"""Other people's results beside the same measure on the packaged models, one file an experiment."""
