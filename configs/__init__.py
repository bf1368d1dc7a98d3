"""Typed configuration: what a user may write, how it is read, and how it is fingerprinted.

Imports none of the other packages and no torch, so that ``--help`` answers in under a second.
"""
