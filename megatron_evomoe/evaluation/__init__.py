"""Published benchmarks: an exported model answers their questions and gets their official metrics."""
