"""Pages, figures and tables that show a run."""
