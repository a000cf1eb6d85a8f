"""Trained models at work: words pronounced, sentences translated, pairs scored."""
