"""Notebooks: percent-format scripts, and executed copies beside them (see `execute`)."""
