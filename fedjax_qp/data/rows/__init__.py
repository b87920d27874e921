"""Rows: arrays of numbers of any shape, with classes, labels or numbers to predict."""
