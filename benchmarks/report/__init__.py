"""Results of run.py: records, tables, comparisons and plots."""
