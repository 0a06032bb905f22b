"""What a model takes of a machine, and where its layers go."""
