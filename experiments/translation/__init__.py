"""Translation: parallel text, subwords, and trained translators."""
