"""One step over several devices: the mesh, what divides which axis, and calls on each part."""
