"""What is learned from: lexicons, parallel text, vocabularies, tokens on disk, packed batches."""
