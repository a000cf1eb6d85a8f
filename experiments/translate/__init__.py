"""The task of translating text: its flags, its training, its report."""
