"""How fast this is beside what people use: the same work, in turn, in fresh processes."""
