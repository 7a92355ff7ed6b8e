"""A small video diffusion transformer, and clips with real pictures to train it on: shared by the examples."""
