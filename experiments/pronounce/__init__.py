"""The pronunciation task: flags, training, report."""
