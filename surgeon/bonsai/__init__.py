"""Bonsai: which units a model needs, found with forward passes of randomly masked sub-models only.

Reference: Dery, Kolawole, Kagey, Smith, Neubig & Talwalkar 2024, *Everybody Prune Now: Structured Pruning of LLMs with
only Forward Passes*, arXiv 2402.05406.
"""
