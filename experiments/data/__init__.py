"""Training data: lexicons, parallel text, vocabularies, tokens on disk, packed batches."""
