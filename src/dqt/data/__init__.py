"""Text to tokens: sources, a byte-level tokenizer, memory-mapped shards, and a sampler without state."""
