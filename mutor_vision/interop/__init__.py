"""LlamaGen's files in and out."""
