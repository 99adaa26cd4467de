"""The model and its preprocessing: the files that travel inside a model folder.

They import each other relatively and nothing else of m2encoder, so that a folder opens in
transformers where m2encoder is not installed.
"""
