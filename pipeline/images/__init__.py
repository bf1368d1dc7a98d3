"""Real images: where they come from, how they are brought to one size, and into shards."""
