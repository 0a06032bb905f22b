"""What computes: layers, mixers, MLPs, states and layouts."""
