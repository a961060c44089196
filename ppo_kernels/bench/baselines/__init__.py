"""What users would otherwise call: torch as a careful user writes it, Inductor, public packages.

Each function takes the arguments of ours and returns the same outputs in the same order; what it
returns in a dict besides (metrics) is computed but not compared.
"""
