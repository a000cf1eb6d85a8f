"""What an accelerator does with this library, part by part, each in a process of its own.

`command` is the parent, which never touches the accelerator; `worker` runs one part of `parts`.
"""
