"""Devices, degrees of parallelism, process groups, and what ranks send each other."""
