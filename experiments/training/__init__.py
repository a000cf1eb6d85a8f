"""One training: flags, loop, placement on devices, stopping and resuming."""
