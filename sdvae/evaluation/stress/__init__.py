"""Stress tests of an evaluation."""
