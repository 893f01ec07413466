"""Measuring attention: speed, accuracy and memory, with naive attention and SDPA always beside it.

`suites` says what is measured, `run` measures it, `results` stores it, `report` and `plots` show it, `compare` sets
two runs side by side and `profile` follows memory as the sequence grows. Every number that the package states comes
from here.
"""
