"""Measures of routing and of experts, their records, and figures drawn from the records alone."""
