"""One training: its flags, its loop, what its devices share, how it stops and goes on."""
