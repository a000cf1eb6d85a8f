"""Trained models at work: words pronounced, sentences translated, pairs scored."""

from experiments.inference.saved import load as load
