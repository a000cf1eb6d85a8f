"""What an answer is worth: edit distance, error rates, BLEU and chrF."""
