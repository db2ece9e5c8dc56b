"""The backend over torch's FlexAttention: compiled on CUDA, where it skips EMPTY blocks; on the CPU by name only.

Nouns: a *block mask* (torch's lists of tiles), a *score_mod* (soft cap and bias as a function of cells). The words:
docs/internals/glossary.md.
"""
