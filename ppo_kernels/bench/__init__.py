"""Microbenchmarks: `ppo-kernels bench`.

`cases` says what is measured and against which `baselines`, `run` measures it (`timing`, `memory`),
`results` keeps it as CSV and Markdown, `plot` draws it, `cli` reads the command line.
"""
