"""Published benchmarks: their own files in, an exported model's answers, their official metrics out
(docs/evaluation.md).
"""
