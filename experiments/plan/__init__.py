"""What a training would need and how fast it should be, on devices that are not at hand."""
