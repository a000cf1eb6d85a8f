"""The translation task: flags, training, report."""
