"""Tests of the training recipes and the embedded model."""
