"""Tests of the scenes world."""
