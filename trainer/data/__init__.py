"""What a run learns from, by position: two endless streams, pairs and prompts, and the micro-batches cut from them."""
