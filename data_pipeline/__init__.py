"""Pairs in, shards out, batches back: the sources, writers and streams of training data.

Not for models or metrics; this package imports the core only, never eval.
"""
