"""Choosing pairs of a dataset by what is known of them."""
