"""The parts that compute: layers, mixers, MLPs, states and layouts."""
