"""What training writes to disk: checkpoints, the manifests that prove them, parameters alone."""
