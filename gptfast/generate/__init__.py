"""Generation: the KV cache and the loop."""
