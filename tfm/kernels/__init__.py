"""The same results as the formulas, faster: how arrays are multiplied, and in which precision."""
