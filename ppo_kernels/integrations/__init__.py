"""Our functions under the names and signatures of other packages', and what puts them there.

One module per package, imported by name; nothing is replaced before its `patch()` is called.
"""
