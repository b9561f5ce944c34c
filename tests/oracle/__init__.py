"""Mergemill beside mergekit 0.1.5 and transformers: ``make oracle`` runs ``python -m tests.oracle``.

They live in an environment of their own, since their pins clash with ours; the environment variable
``MERGEMILL_ORACLE_PYTHON`` names its interpreter. Plain ``pytest`` collects nothing here but the tests of
the comparison itself.
"""
