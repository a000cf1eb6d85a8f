"""Inference with trained models: pronounce words, translate sentences, score pairs."""

from experiments.inference.saved import load as load
