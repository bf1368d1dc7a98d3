"""The data contract: how pairs lie on storage, how they get there, and how one knows that they are whole.

docs/shard_format.md is the contract in prose. Nothing here knows about teachers, samplers or executors.
"""
