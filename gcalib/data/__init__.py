"""Pairs of domains: reading, preparing and splitting them, their item texts, and batches."""
