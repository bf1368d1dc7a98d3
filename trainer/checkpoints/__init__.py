"""Everything a later process needs to go on: named tensors in folders that prove themselves whole."""
