"""The laboratory: suites of experiments, checks, measurements and reports."""
