"""Embeddings in, numbers out: retrieval, the evaluation suite and the HTML report.

Not for embedding (embed.py), classifiers (zero_shot.py) or FAISS (index.py): those are core.
"""
