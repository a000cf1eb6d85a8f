"""Measures this library on an accelerator, each part in a separate process.

`command` is the parent, which never touches the accelerator; `worker` runs one part of `parts`.
"""
