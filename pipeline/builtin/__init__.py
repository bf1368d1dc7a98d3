"""How the built-in teacher and its judge were made: the garments, the networks, the training. Run by two stages.

Nothing here is imported by generating pairs, training a student or evaluating one. What came out of it lies in
``pipeline/teachers/builtin/``.
"""
