"""The world around `tfm`: data, training runs, measurements and reports."""
