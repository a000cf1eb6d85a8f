"""What training writes to disk: checkpoints with manifests, run folders, exported parameters."""
