"""Data, and the mathematics that data and training share.

Below everything lies :mod:`pipeline.diffusion`, the pure mathematics. On it stand the teachers, the noise, the prompt
tables and the shards, and on those the making of pairs. Nothing here knows the trainer, and only
``pipeline/ray_executor.py`` knows the cluster.
"""
