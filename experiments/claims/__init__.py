"""The eleven questions about the Transformer, each answered by measurement; one file a question."""
