"""The task of pronouncing words: its flags, its training, its report."""
