"""Timing that the command line and the benchmarks share: workloads, turns and medians, the calibration of costs.

Nouns: a *workload* (mask, sizes, dtype), a *contestant*, a *median*. What prints tables for people does not come in.
The words: docs/internals/glossary.md.
"""
