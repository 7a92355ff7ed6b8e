"""The paper's comparison in small: one video diffusion transformer, fine-tuned by equal steps in many ways.

`python -m examples.paper_table --help` lists what it does; docs/paper_table.md is its outcome.
"""
