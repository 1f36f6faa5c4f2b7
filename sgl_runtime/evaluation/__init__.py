"""Evaluation: data sets and metrics, rankings and methods side by side, calibrated thresholds, reports."""
