"""Scores of hypotheses: edit distance, error rates, BLEU and chrF."""
