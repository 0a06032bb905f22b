"""Other people's results and the same measure on the packaged models, one file an experiment."""
