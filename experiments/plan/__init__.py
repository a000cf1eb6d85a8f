"""Estimates the memory, traffic and time of a training on devices that are not available."""
